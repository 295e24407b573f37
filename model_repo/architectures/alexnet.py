"""AlexNet: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

The variant of the public PyTorch checkpoint, with its parameter names: no groups, no local response
normalisation, 64 filters in the first layer.
"""

from collections import OrderedDict

from torch import nn

from model_repo.architectures.adaptive_pool import AdaptiveAveragePool
from model_repo.architectures.registry import architecture


@architecture(input_shape=(3, 224, 224), classes=1000, min_side=63)
def alexnet(classes: int) -> nn.Module:
    """[N, 3, 224, 224] -> logits [N, classes]; 61,100,840 parameters at 1,000 classes."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(),  # [N, 64, 55, 55]
        nn.MaxPool2d(3, stride=2),  # [N, 64, 27, 27]
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, stride=2),  # [N, 192, 13, 13]
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(3, stride=2),  # [N, 256, 6, 6]
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(),
        nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, classes),
    )  # fmt: skip
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=AdaptiveAveragePool(6),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
