"""AlexNet: "ImageNet classification with deep convolutional neural networks", 2012.

Krizhevsky, Sutskever, Hinton. As printed: two groups, one for each of the paper's two GPUs, and
local response normalisation. The input is 227x227, because 224x224, as in the paper, does not give
the paper's first layer of 55x55.
"""

from collections import OrderedDict

from torch import nn

from model_repo.architectures.registry import architecture


def response_norm() -> nn.Module:
    """Section 3.3: b = a / (2 + 1e-4 * sum of a^2 over 5 neighbouring channels)^0.75.

    torch divides alpha by the number of summed channels; the paper does not.
    """
    return nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)


@architecture(input_shape=(3, 227, 227), classes=1000)
def alexnet2012(classes: int) -> nn.Module:
    """[N, 3, 227, 227] -> logits [N, classes]; 60,965,224 parameters at 1,000 classes."""
    features = nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), response_norm(),  # [N, 96, 55, 55]
        nn.MaxPool2d(3, stride=2),  # [N, 96, 27, 27]
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), response_norm(),
        nn.MaxPool2d(3, stride=2),  # [N, 256, 13, 13]
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),  # the only layer that connects both groups
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(),
        nn.MaxPool2d(3, stride=2),  # [N, 256, 6, 6]
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(4096, classes),
    )  # fmt: skip
    return nn.Sequential(
        OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier)
    )
