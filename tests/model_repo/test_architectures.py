"""The networks: how many parameters, by which names, and what a name gives."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from model_repo import architectures
from model_repo.architectures import ARCHITECTURES, architecture, architecture_names, create

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


def test_every_promised_network_is_registered() -> None:
    assert architecture_names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_has_as_many_parameters_as_its_paper(name: str) -> None:
    assert trainable(on_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_a_network_in_training_has_those_of_both_auxiliary_classifiers_too(name: str) -> None:
    assert trainable(on_meta(name, auxiliary=True)) == PARAMETERS_IN_TRAINING[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_gives_one_row_of_logits_an_image(name: str) -> None:
    shape = ARCHITECTURES[name].input_shape
    logits = on_meta(name, classes=7)(torch.empty(2, *shape, device="meta"))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("checkpoint", sorted(PUBLIC.glob("*.json")), ids=lambda path: path.stem)
def test_a_public_checkpoint_loads_strictly(checkpoint: Path) -> None:
    shapes = json.loads(checkpoint.read_text())
    found = ARCHITECTURES[checkpoint.stem]
    public = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = on_meta(checkpoint.stem, auxiliary=found.training is not None)
    network.load_state_dict(public, strict=True, assign=True)
    assert {name: list(t.shape) for name, t in network.state_dict().items()} == shapes


def test_every_network_with_public_weights_is_compared_with_them() -> None:
    without = {"lenet5", "alexnet2012", "plain18", "plain34", "googlenet2014"}
    assert {path.stem for path in PUBLIC.glob("*.json")} == PARAMETERS.keys() - without


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_the_served_network_is_the_one_in_training_without_its_auxiliary_classifiers(
    name: str,
) -> None:
    served = on_meta(name).state_dict()
    training = on_meta(name, auxiliary=True).state_dict()
    prefixes = ARCHITECTURES[name].training_only
    assert prefixes == ("aux1.", "aux2.")
    assert served.keys() == {key for key in training if not key.startswith(prefixes)}


@pytest.mark.parametrize("name", PARAMETERS_IN_TRAINING)
def test_predictions_in_training_are_named_and_have_no_order(name: str) -> None:
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


def test_a_name_is_registered_once() -> None:
    def lenet5(classes: int) -> nn.Module:
        return nn.Identity()

    register = architecture(input_shape=(1, 32, 32), classes=10)
    with pytest.raises(ValueError, match=r"'lenet5' is registered already.*architectures\.lenet5"):
        register(lenet5)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'resnet19' is unknown; there are alexnet, .*vgg16"):
        create("resnet19")


def test_a_network_without_auxiliary_classifiers_says_so() -> None:
    with pytest.raises(ValueError, match="vgg16 has no auxiliary classifiers"):
        create("vgg16", auxiliary=True)


def test_no_network_has_no_classes() -> None:
    with pytest.raises(ValueError, match="at least 1 class, not 0"):
        create("lenet5", 0)


def test_a_training_variant_must_say_which_parameters_are_its_own() -> None:
    with pytest.raises(ValueError, match="given together"):
        architectures.Architecture(
            name="half",
            build=lambda classes: nn.Identity(),
            input_shape=(3, 224, 224),
            classes=1000,
            training=lambda classes: nn.Identity(),
        )
