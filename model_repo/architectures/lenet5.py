"""LeNet-5: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

Differences from the paper: ReLU instead of tanh; max pooling instead of trainable averages in S2
and S4; each filter of C3 sees every channel; the output layer is linear.
"""

from torch import nn

from model_repo.architectures.registry import architecture


@architecture(input_shape=(1, 32, 32), classes=10)
def lenet5(classes: int) -> nn.Module:
    """[N, 1, 32, 32] -> logits [N, classes]; 61,706 parameters at 10 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),  # C1, S2: [N, 6, 14, 14]
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # C3, S4: [N, 16, 5, 5]
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),  # C5
        nn.Linear(120, 84), nn.ReLU(),  # F6
        nn.Linear(84, classes),
    )  # fmt: skip
