"""The average pool that VGG and AlexNet of the public checkpoints have before their dense layers.

It makes the same number of features from an image of any size. With the paper's image size it
changes nothing.
"""

import torch
from torch import Tensor, nn


class AdaptiveAveragePool(nn.Module):
    """torch's AdaptiveAvgPool2d(side), as two products with matrices of shares.

    Exported, torch's own module becomes index arithmetic if the sizes are not multiples.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, side, side]."""
        height, width = x.shape[2:]
        if height != self.side:
            x = shares(self.side, height).to(x) @ x
        if width != self.side:
            x = x @ shares(self.side, width).to(x).T
        return x


def shares(results: int, values: int) -> Tensor:
    """[results, values]: each row has the average of its window, which may overlap the next one."""
    matrix = torch.zeros(results, values)
    for row in range(results):
        first, end = row * values // results, -(-(row + 1) * values // results)
        matrix[row, first:end] = 1 / (end - first)
    return matrix
