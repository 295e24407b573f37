"""VGG: "Very deep convolutional networks for large-scale image recognition", 2014.

Simonyan, Zisserman. Configuration D of table 1: 13 convolutions of 3x3 with stride 1, which keep
the size, and 5 max pools of 2x2 with stride 2. The parameters have the names of the public PyTorch
checkpoint.
"""

from collections import OrderedDict

from torch import nn

from model_repo.architectures.adaptive_pool import AdaptiveAveragePool
from model_repo.architectures.registry import architecture

# Widths of the convolutions, one tuple for each image size.
D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@architecture(input_shape=(3, 224, 224), classes=1000, min_side=32)
def vgg16(classes: int) -> nn.Module:
    """[N, 3, 224, 224] -> logits [N, classes]; 138,357,544 parameters at 1,000 classes."""
    features: list[nn.Module] = []
    channels = 3
    for stage in D:  # output sizes: 112, 56, 28, 14, 7
        for width in stage:
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        features.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(4096, classes),
    )  # fmt: skip
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            avgpool=AdaptiveAveragePool(7),  # [N, 512, 7, 7]
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
