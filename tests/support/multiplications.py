"""Counts the multiplications of a network."""

from __future__ import annotations

from torch import Tensor, nn


def multiplications(network: nn.Module, image: Tensor) -> int:
    """The multiplications of all convolutions and dense layers for one image."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += output[0].numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    network(image)
    for hook in hooks:
        hook.remove()
    return total
