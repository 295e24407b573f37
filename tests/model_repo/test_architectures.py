"""The registered networks: their parameters, their names, and errors of the registry."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from model_repo import cards
from model_repo.architectures.adaptive_pool import AdaptiveAveragePool
from model_repo.architectures.registry import (
    Architecture,
    architecture,
    architecture_names,
    create,
    find,
)

PUBLIC = Path(__file__).parent / "public_checkpoints"

PARAMETERS = {
    "lenet5": 61_706,
    "alexnet": 61_100_840,
    "alexnet2012": 60_965_224,
    "vgg16": 138_357_544,
    "plain18": 11_515_688,
    "plain34": 21_623_848,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "googlenet": 6_624_904,
    "googlenet2014": 6_998_552,
}
PARAMETERS_IN_TRAINING = {"googlenet": 13_004_888, "googlenet2014": 13_378_280}


def on_meta(name: str, classes: int | None = None, *, auxiliary: bool = False) -> nn.Module:
    with torch.device("meta"):
        return create(name, classes, auxiliary=auxiliary).eval()


def trainable(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_every_network_is_registered() -> None:
    assert architecture_names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_has_the_expected_number_of_parameters(name: str) -> None:
    assert trainable(on_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_the_parameters_in_training_include_both_auxiliary_classifiers(name: str) -> None:
    assert trainable(on_meta(name, auxiliary=True)) == PARAMETERS_IN_TRAINING[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_returns_one_row_of_logits_for_each_image(name: str) -> None:
    shape = find(name).input_shape
    logits = on_meta(name, classes=7)(torch.empty(2, *shape, device="meta"))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_takes_every_size_from_its_smallest_on(name: str) -> None:
    found = find(name)
    channels, height, width = found.input_shape
    assert not found.why_not(channels, height, width)
    if not found.min_side:
        assert found.why_not(channels, height + 1, width).startswith("must be ")
        return
    network = on_meta(name, classes=7).eval()
    least = found.min_side
    for size in ((least, least), (least, 3 * least + 1), (256, 240), (449, 331)):
        assert not found.why_not(channels, *size)
        assert network(torch.empty(2, channels, *size, device="meta")).shape == (2, 7)
    if least > 1:
        assert "must be at least" in found.why_not(channels, least, least - 1)
        with pytest.raises(RuntimeError):
            network(torch.empty(2, channels, least, least - 1, device="meta"))


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (14, 7), (9, 20), (1, 3)])
def test_the_adaptive_pool_equals_torchs(size: tuple[int, int]) -> None:
    images = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(AdaptiveAveragePool(7)(images), nn.AdaptiveAvgPool2d(7)(images))


@pytest.mark.parametrize("checkpoint", sorted(PUBLIC.glob("*.json")), ids=lambda path: path.stem)
def test_a_public_checkpoint_loads_strictly(checkpoint: Path) -> None:
    shapes = json.loads(checkpoint.read_text())
    has_auxiliary = find(checkpoint.stem).training is not None
    public = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = on_meta(checkpoint.stem, auxiliary=has_auxiliary)
    network.load_state_dict(public, strict=True, assign=True)
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_every_network_with_a_public_checkpoint_is_compared_with_it() -> None:
    public = {name for name in PARAMETERS if cards.load(name).weights.startswith("https:")}
    assert {path.stem for path in PUBLIC.glob("*.json")} == public


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_the_served_network_lacks_only_the_auxiliary_classifiers(
    name: str,
) -> None:
    served = on_meta(name).state_dict()
    training = on_meta(name, auxiliary=True).state_dict()
    prefixes = find(name).training_only
    assert prefixes == ("aux1.", "aux2.")
    assert served.keys() == {key for key in training if not key.startswith(prefixes)}


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_predictions_in_training_have_names_and_are_not_a_tuple(name: str) -> None:
    network = on_meta(name, classes=7, auxiliary=True)
    predictions = network(torch.empty(2, 3, 224, 224, device="meta"))
    for part in (predictions.logits, predictions.aux1, predictions.aux2):
        assert part.shape == (2, 7)
    assert not isinstance(predictions, tuple)


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_the_auxiliary_classifiers_do_not_change_the_logits(name: str) -> None:
    torch.manual_seed(0)
    training = create(name, classes=3, auxiliary=True).eval()
    served = create(name, classes=3).eval()
    served.load_state_dict({k: training.state_dict()[k] for k in served.state_dict()})
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(served(image), training(image).logits)


def test_a_name_cannot_be_registered_twice() -> None:
    def lenet5(classes: int) -> nn.Module:
        return nn.Identity()

    register = architecture(input_shape=(1, 32, 32), classes=10)
    with pytest.raises(ValueError, match=r"'lenet5' is already registered.*architectures\.lenet5"):
        register(lenet5)


def test_the_message_about_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet19' is unknown; choose one of alexnet, .*vgg16"):
        create("resnet19")


def test_auxiliary_classifiers_cannot_be_requested_from_a_network_without_them() -> None:
    with pytest.raises(ValueError, match="vgg16 has no auxiliary classifiers"):
        create("vgg16", auxiliary=True)


def test_a_network_needs_at_least_one_class() -> None:
    with pytest.raises(ValueError, match="at least 1 class, not 0"):
        create("lenet5", 0)


def test_a_training_network_must_name_its_extra_parameters() -> None:
    with pytest.raises(ValueError, match="must be given together"):
        Architecture(
            name="half",
            build=lambda classes: nn.Identity(),
            input_shape=(3, 224, 224),
            classes=1000,
            training=lambda classes: nn.Identity(),
        )
