"""ResNet: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015.

The five depths of table 1, and the plain networks of 18 and 34 layers from the paper's comparison.
Variant v1.5: a bottleneck has its stride in the 3x3 convolution; in the paper it is in the 1x1
convolution before. A shortcut is the identity, or a 1x1 projection if the shape changes (option B).
The parameters have the names of the public PyTorch checkpoints.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from model_repo.architectures.registry import architecture

IMAGENET = (3, 224, 224)

Block = Callable[[int, int, int], nn.Module]  # channels in, channels out, stride


def conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1. The batch norm after it has the bias."""
    return nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, bias=False)


def shortcut(channels: int, width: int, stride: int) -> nn.Module:
    """The identity, or a projection if the shape changes (option B)."""
    if channels == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(conv(channels, width, 1, stride), nn.BatchNorm2d(width))


class Plain(nn.Module):
    """Two 3x3 convolutions without a shortcut: the plain network of figure 3."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x))


class Basic(Plain):
    """Two 3x3 convolutions with a shortcut: figure 2."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3, 1x1 back, with a shortcut: figure 5, right."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        narrow = width // 4
        self.conv1 = conv(channels, narrow, 1)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = conv(narrow, narrow, 3, stride)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = conv(narrow, width, 1)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.downsample(x))


class ResNet(nn.Module):
    """Table 1: a 7x7 convolution, four stages of blocks, global average pool, dense layer."""

    def __init__(
        self,
        block: Block,
        blocks: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)  # [N, 64, 112, 112]
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)  # [N, 64, 56, 56]
        self.layer1 = stage(block, blocks[0], 64, widths[0], 1)  # conv2_x: 56x56
        self.layer2 = stage(block, blocks[1], widths[0], widths[1], 2)  # conv3_x: 28x28
        self.layer3 = stage(block, blocks[2], widths[1], widths[2], 2)  # conv4_x: 14x14
        self.layer4 = stage(block, blocks[3], widths[2], widths[3], 2)  # conv5_x: 7x7
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 224, 224] -> logits [N, classes]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def stage(block: Block, blocks: int, channels: int, width: int, stride: int) -> nn.Sequential:
    """Blocks of one width. The first one changes the shape."""
    first = block(channels, width, stride)
    return nn.Sequential(first, *(block(width, width, 1) for _ in range(blocks - 1)))


NARROW = (64, 128, 256, 512)
WIDE = (256, 512, 1024, 2048)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def plain18(classes: int) -> nn.Module:
    """ResNet-18 without its shortcuts; 11,515,688 parameters at 1,000 classes."""
    return ResNet(Plain, (2, 2, 2, 2), NARROW, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def plain34(classes: int) -> nn.Module:
    """ResNet-34 without its shortcuts; 21,623,848 parameters at 1,000 classes."""
    return ResNet(Plain, (3, 4, 6, 3), NARROW, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def resnet18(classes: int) -> nn.Module:
    """11,689,512 parameters at 1,000 classes."""
    return ResNet(Basic, (2, 2, 2, 2), NARROW, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def resnet34(classes: int) -> nn.Module:
    """21,797,672 parameters at 1,000 classes."""
    return ResNet(Basic, (3, 4, 6, 3), NARROW, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def resnet50(classes: int) -> nn.Module:
    """25,557,032 parameters at 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), WIDE, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def resnet101(classes: int) -> nn.Module:
    """44,549,160 parameters at 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), WIDE, classes)


@architecture(input_shape=IMAGENET, classes=1000, min_side=1)
def resnet152(classes: int) -> nn.Module:
    """60,192,808 parameters at 1,000 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), WIDE, classes)
