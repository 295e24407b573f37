"""GoogLeNet: Szegedy, Liu, Jia et al., "Going deeper with convolutions", 2014.

Two variants:
- `googlenet2014` is table 1 as printed: 5x5 branches, biases, local response normalisation.
- `googlenet` is the variant of the public PyTorch checkpoint, with its parameter names: batch norm
  after every convolution, 3x3 in the branch that the paper calls 5x5, a fourth pool of 2x2, and
  auxiliary classifiers that pool 14x14 to 4x4.

Both are trained with two auxiliary classifiers. The served network does not have them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor, cat, nn
from torch.nn import functional as F

from model_repo.architectures.registry import architecture

IMAGENET = (3, 224, 224)


class Widths(NamedTuple):
    """One inception row of table 1: input channels, then the width of each convolution in order."""

    channels: int
    one: int
    three_reduce: int
    three: int
    five_reduce: int
    five: int
    pool: int

    @property
    def out(self) -> int:
        return self.one + self.three + self.five + self.pool


TABLE_1 = {
    "3a": Widths(192, 64, 96, 128, 16, 32, 32),
    "3b": Widths(256, 128, 128, 192, 32, 96, 64),
    "4a": Widths(480, 192, 96, 208, 16, 48, 64),
    "4b": Widths(512, 160, 112, 224, 24, 64, 64),
    "4c": Widths(512, 128, 128, 256, 24, 64, 64),
    "4d": Widths(512, 112, 144, 288, 32, 64, 64),
    "4e": Widths(528, 256, 160, 320, 32, 128, 128),
    "5a": Widths(832, 256, 160, 320, 32, 128, 128),
    "5b": Widths(832, 384, 192, 384, 48, 128, 128),
}


class Conv(Protocol):
    """A convolution with its normalisation and activation: input channels, width, kernel size."""

    def __call__(self, channels: int, width: int, size: int, stride: int = 1) -> nn.Module: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The differences between the public network and the printed one."""

    conv: Conv
    five: int  # kernel size in the branch that the paper calls 5x5
    response_norm: bool  # after the first pool and before the second
    fourth_pool: int  # kernel size
    auxiliary_pool: nn.Module  # [N, C, 14, 14] -> [N, C, 4, 4]; shared, as it has no parameters
    dropout: float  # before the last layer


class NormalisedConv(nn.Module):
    """Convolution, batch norm, ReLU; keeps the size at stride 1."""

    def __init__(self, channels: int, width: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PrintedConv(nn.Module):
    """Convolution with a bias, ReLU; keeps the size at stride 1."""

    def __init__(self, channels: int, width: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, size, stride, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


PUBLIC = Variant(
    conv=NormalisedConv,
    five=3,
    response_norm=False,
    fourth_pool=2,
    auxiliary_pool=nn.AdaptiveAvgPool2d(4),
    dropout=0.2,
)
PRINTED = Variant(
    conv=PrintedConv,
    five=5,
    response_norm=True,
    fourth_pool=3,
    auxiliary_pool=nn.AvgPool2d(5, stride=3),
    dropout=0.4,
)


class Inception(nn.Module):
    """Figure 2(b): four branches, whose outputs are concatenated."""

    def __init__(self, widths: Widths, variant: Variant) -> None:
        super().__init__()
        conv, w = variant.conv, widths
        self.branch1 = conv(w.channels, w.one, 1)
        self.branch2 = nn.Sequential(
            conv(w.channels, w.three_reduce, 1), conv(w.three_reduce, w.three, 3)
        )
        self.branch3 = nn.Sequential(
            conv(w.channels, w.five_reduce, 1), conv(w.five_reduce, w.five, variant.five)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), conv(w.channels, w.pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, out, H, W]."""
        return cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


class Auxiliary(nn.Module):
    """A classifier on an intermediate layer. In training it adds a gradient to lower layers."""

    def __init__(self, channels: int, classes: int, variant: Variant) -> None:
        super().__init__()
        self.pool = variant.auxiliary_pool
        self.conv = variant.conv(channels, 128, 1)
        self.fc1 = nn.Linear(4 * 4 * 128, 1024)
        self.fc2 = nn.Linear(1024, classes)
        self.dropout = nn.Dropout(0.7)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, 14, 14] -> logits [N, classes]."""
        x = self.conv(self.pool(x)).flatten(1)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x))))
        return logits


class Stages(nn.Module):
    """Table 1 in three parts. The auxiliary classifiers use the outputs of the first two."""

    def __init__(self, variant: Variant, classes: int) -> None:
        super().__init__()
        conv = variant.conv

        def halve(size: int) -> nn.Module:
            return nn.MaxPool2d(size, stride=2, ceil_mode=True)

        def norm() -> nn.Module:
            # The paper gives no numbers; these are from the authors' Caffe model.
            return nn.LocalResponseNorm(5) if variant.response_norm else nn.Identity()

        self.conv1 = conv(3, 64, 7, 2)  # [N, 64, 112, 112]
        self.maxpool1 = halve(3)  # [N, 64, 56, 56]
        self.norm1 = norm()
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3)
        self.norm2 = norm()
        self.maxpool2 = halve(3)  # [N, 192, 28, 28]
        self.inception3a = Inception(TABLE_1["3a"], variant)
        self.inception3b = Inception(TABLE_1["3b"], variant)
        self.maxpool3 = halve(3)  # [N, 480, 14, 14]
        self.inception4a = Inception(TABLE_1["4a"], variant)
        self.inception4b = Inception(TABLE_1["4b"], variant)
        self.inception4c = Inception(TABLE_1["4c"], variant)
        self.inception4d = Inception(TABLE_1["4d"], variant)
        self.inception4e = Inception(TABLE_1["4e"], variant)
        self.maxpool4 = halve(variant.fourth_pool)  # [N, 832, 7, 7]
        self.inception5a = Inception(TABLE_1["5a"], variant)
        self.inception5b = Inception(TABLE_1["5b"], variant)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(variant.dropout)
        self.fc = nn.Linear(TABLE_1["5b"].out, classes)

    def to_4a(self, x: Tensor) -> Tensor:
        """[N, 3, 224, 224] -> [N, 512, 14, 14]."""
        x = self.norm1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        out: Tensor = self.inception4a(x)
        return out

    def to_4d(self, x: Tensor) -> Tensor:
        """The output of 4a -> [N, 528, 14, 14]."""
        out: Tensor = self.inception4d(self.inception4c(self.inception4b(x)))
        return out

    def to_logits(self, x: Tensor) -> Tensor:
        """The output of 4d -> logits [N, classes]."""
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))  # [N, 1024, 7, 7]
        logits: Tensor = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        return logits


class GoogLeNet(Stages):
    """The served network."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 224, 224] -> logits [N, classes]."""
        return self.to_logits(self.to_4d(self.to_4a(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Outputs in training, each [N, classes] logits."""

    logits: Tensor
    aux1: Tensor  # from 4a; the paper weights both auxiliary losses by 0.3
    aux2: Tensor  # from 4d


class GoogLeNetInTraining(Stages):
    """The network with its two auxiliary classifiers."""

    def __init__(self, variant: Variant, classes: int) -> None:
        super().__init__(variant, classes)
        self.aux1 = Auxiliary(TABLE_1["4a"].out, classes, variant)
        self.aux2 = Auxiliary(TABLE_1["4d"].out, classes, variant)

    def forward(self, x: Tensor) -> Predictions:
        """[N, 3, 224, 224] -> three outputs of [N, classes] logits."""
        a = self.to_4a(x)
        d = self.to_4d(a)
        return Predictions(logits=self.to_logits(d), aux1=self.aux1(a), aux2=self.aux2(d))


@architecture(
    input_shape=IMAGENET,
    classes=1000,
    min_side=15,
    training=partial(GoogLeNetInTraining, PUBLIC),
    training_only=("aux1.", "aux2."),
)
def googlenet(classes: int) -> nn.Module:
    """6,624,904 parameters at 1,000 classes; 13,004,888 in training."""
    return GoogLeNet(PUBLIC, classes)


@architecture(
    input_shape=IMAGENET,
    classes=1000,
    min_side=31,
    training=partial(GoogLeNetInTraining, PRINTED),
    training_only=("aux1.", "aux2."),
)
def googlenet2014(classes: int) -> nn.Module:
    """6,998,552 parameters at 1,000 classes; 13,378,280 in training."""
    return GoogLeNet(PRINTED, classes)
