"""The networks have the shapes and properties that their papers state."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model_repo.architectures import googlenet, resnet
from model_repo.architectures.alexnet2012 import response_norm
from model_repo.architectures.registry import architecture_names, create, find
from tests.support.multiplications import multiplications


def sizes(name: str, *modules: str) -> list[tuple[int, ...]]:
    """(C, H, W) of each named module's output for one image."""
    with torch.device("meta"):
        network = create(name).eval()
        shapes: dict[str, tuple[int, ...]] = {}
        for module in modules:
            network.get_submodule(module).register_forward_hook(
                lambda _, __, out, module=module: shapes.update({module: tuple(out.shape[1:])})
            )
        network(torch.empty(1, *find(name).input_shape))
    return [shapes[module] for module in modules]


def pools(name: str) -> list[str]:
    with torch.device("meta"):
        network = create(name)
    return [key for key, module in network.named_modules() if isinstance(module, nn.MaxPool2d)]


def test_lenet5_has_the_sizes_of_figure_2() -> None:
    assert sizes("lenet5", "0", "2", "3", "5") == [
        (6, 28, 28),  # C1
        (6, 14, 14),  # S2
        (16, 10, 10),  # C3
        (16, 5, 5),  # S4
    ]


def test_alexnet2012_has_the_sizes_of_figure_2() -> None:
    convolutions = sizes(
        "alexnet2012", "features.0", "features.4", "features.8", "features.10", "features.12"
    )
    assert convolutions == [
        (96, 55, 55),
        (256, 27, 27),
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
    ]
    assert sizes("alexnet2012", *pools("alexnet2012")) == [
        (96, 27, 27),
        (256, 13, 13),
        (256, 6, 6),
    ]


def test_alexnet2012_has_two_groups_in_the_second_fourth_and_fifth_layer() -> None:
    with torch.device("meta"):
        network = create("alexnet2012")
    groups = [m.groups for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert groups == [1, 2, 1, 2, 2]


def test_response_norm_computes_the_formula_of_section_3_3() -> None:
    a = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    b = torch.empty_like(a)
    k, n, alpha, beta = 2, 5, 1e-4, 0.75
    for i in range(8):
        neighbours = a[:, max(0, i - n // 2) : min(7, i + n // 2) + 1]
        b[:, i] = a[:, i] / (k + alpha * neighbours.square().sum(1)) ** beta
    torch.testing.assert_close(response_norm()(a), b)


def test_alexnet_has_the_sizes_of_alexnet2012_with_other_widths() -> None:
    assert sizes("alexnet", *pools("alexnet")) == [(64, 27, 27), (192, 13, 13), (256, 6, 6)]


def test_vgg16_halves_the_size_five_times() -> None:
    assert sizes("vgg16", *pools("vgg16")) == [
        (64, 112, 112),
        (128, 56, 56),
        (256, 28, 28),
        (512, 14, 14),
        (512, 7, 7),
    ]


def test_every_convolution_of_vgg16_is_3x3_and_keeps_the_size() -> None:
    with torch.device("meta"):
        network = create("vgg16")
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    assert {(m.kernel_size, m.stride, m.padding) for m in convolutions} == {
        ((3, 3), (1, 1), (1, 1))
    }
    max_pools = [m for m in network.modules() if isinstance(m, nn.MaxPool2d)]
    assert {(m.kernel_size, m.stride, m.padding) for m in max_pools} == {(2, 2, 0)}
    assert sum(isinstance(m, nn.Linear) for m in network.modules()) == 3


@pytest.mark.parametrize(
    ("name", "widening"),
    [("plain18", 1), ("plain34", 1), ("resnet18", 1), ("resnet34", 1)]
    + [("resnet50", 4), ("resnet101", 4), ("resnet152", 4)],
)
def test_resnets_and_plain_nets_have_the_sizes_of_table_1(name: str, widening: int) -> None:
    modules = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    assert sizes(name, *modules) == [
        (64, 112, 112),
        (64, 56, 56),
        (64 * widening, 56, 56),
        (128 * widening, 28, 28),
        (256 * widening, 14, 14),
        (512 * widening, 7, 7),
        (512 * widening, 1, 1),
    ]


@pytest.mark.parametrize(
    "name", [name for name in architecture_names() if name[:5] in ("plain", "resne")]
)
def test_resnets_and_plain_nets_have_as_many_layers_as_their_names_say(name: str) -> None:
    with torch.device("meta"):
        network = create(name)
    weighted = [
        key
        for key, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in key
    ]
    assert len(weighted) == int(name.removeprefix("plain").removeprefix("resnet"))


@pytest.mark.parametrize("block", [resnet.Basic(64, 64, 1), resnet.Bottleneck(64, 64, 1)])
def test_a_residual_block_with_a_zero_branch_computes_relu(block: nn.Module) -> None:
    x = torch.randn(2, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    zero_branch(block)
    assert torch.equal(block.eval()(x), F.relu(x))


def test_residual_blocks_with_zero_branches_compute_the_identity() -> None:
    stage = resnet.stage(resnet.Basic, 8, 64, 64, 1).eval()
    for block in stage:
        zero_branch(block)
    x = torch.rand(2, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stage(x), x)


def test_a_plain_block_with_a_zero_branch_loses_its_input() -> None:
    block = resnet.Plain(64, 64, 1).eval()
    zero_branch(block)
    x = torch.rand(2, 64, 14, 14, generator=torch.Generator().manual_seed(0))
    assert not block(x).any()


def zero_branch(block: nn.Module) -> None:
    """Sets the last batch norm of the branch to zero."""
    last = block.bn3 if isinstance(block, resnet.Bottleneck) else block.bn2
    assert isinstance(last, nn.BatchNorm2d)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def test_a_bottleneck_halves_the_size_in_its_3x3_convolution() -> None:
    block = resnet.Bottleneck(256, 512, 2)
    assert [m.stride for m in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_1x1_convolution_is_a_dense_layer_at_every_pixel(bias: bool) -> None:
    torch.manual_seed(0)
    conv = googlenet.PrintedConv(192, 16, 1).conv if bias else resnet.conv(192, 16, 1)
    x = torch.randn(2, 192, 7, 5)
    dense = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(conv(x), dense)


@pytest.mark.parametrize("name", ["googlenet", "googlenet2014"])
def test_googlenet_has_the_sizes_of_table_1(name: str) -> None:
    modules = ["conv1", "maxpool1", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"]
    modules += [f"inception4{letter}" for letter in "abcde"] + ["maxpool4"]
    modules += ["inception5a", "inception5b", "avgpool"]
    assert sizes(name, *modules) == [
        (64, 112, 112),
        (64, 56, 56),
        (192, 56, 56),
        (192, 28, 28),
        (256, 28, 28),
        (480, 28, 28),
        (480, 14, 14),
        (512, 14, 14),
        (512, 14, 14),
        (512, 14, 14),
        (528, 14, 14),
        (832, 14, 14),
        (832, 7, 7),
        (832, 7, 7),
        (1024, 7, 7),
        (1024, 1, 1),
    ]


@pytest.mark.parametrize("variant", [googlenet.PUBLIC, googlenet.PRINTED])
def test_an_inception_block_concatenates_its_branches(variant: googlenet.Variant) -> None:
    torch.manual_seed(0)
    inception = googlenet.Inception(googlenet.TABLE_1["3a"], variant).eval()
    x = torch.rand(1, 192, 28, 28)
    with torch.inference_mode():
        out = inception(x)
        assert out.shape == (1, 256, 28, 28)
        assert torch.equal(out[:, 192:224], inception.branch3(x))  # after 64 and 128 channels


@pytest.mark.parametrize("row", googlenet.TABLE_1)
def test_every_inception_row_has_as_many_inputs_as_the_row_before_has_outputs(row: str) -> None:
    rows = list(googlenet.TABLE_1)
    before = rows.index(row) - 1
    outputs = googlenet.TABLE_1[rows[before]].out if before >= 0 else 192
    assert googlenet.TABLE_1[row].channels == outputs


def test_a_bottleneck_of_16_channels_saves_nine_tenths_of_the_5x5_multiplications() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 192, 28, 28)
        branch = googlenet.Inception(googlenet.TABLE_1["3a"], googlenet.PRINTED).branch3
        direct = googlenet.PrintedConv(192, 32, 5)
        assert branch(x).shape == direct(x).shape == (1, 32, 28, 28)
        reduced, full = multiplications(branch, x), multiplications(direct, x)
    assert reduced == 28 * 28 * (192 * 16 + 16 * 32 * 5 * 5) == 12_443_648
    assert full == 28 * 28 * 192 * 32 * 5 * 5 == 120_422_400
    assert 9 < full / reduced < 11


@pytest.mark.parametrize("variant", [googlenet.PUBLIC, googlenet.PRINTED])
def test_an_auxiliary_classifier_pools_to_4x4(variant: googlenet.Variant) -> None:
    assert variant.auxiliary_pool(torch.empty(1, 512, 14, 14)).shape == (1, 512, 4, 4)
