"""The cards: every network has one, and a wrong one is refused with what is wrong."""

import re
from pathlib import Path

import pytest

from model_repo import cards
from model_repo.architectures import architecture_names
from model_repo.cards import CardError

PUBLIC = {"alexnet", "vgg16", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"} | {
    "googlenet"
}

LENET5 = (cards.CARDS / "lenet5.toml").read_text()


def changed(folder: Path, old: str, new: str) -> cards.Card:
    """The LeNet-5 card with one thing changed, as a card of its own."""
    assert old in LENET5
    (folder / "mine.toml").write_text(LENET5.replace(old, new))
    return cards.load("mine", folder)


def test_every_network_has_a_card_of_its_name() -> None:
    assert cards.names() == architecture_names()
    assert all(cards.load(name).architecture == name for name in cards.names())


@pytest.mark.parametrize("name", sorted(set(cards.names()) - {"lenet5"}))
def test_imagenet_networks_name_a_thousand_classes(name: str) -> None:
    card = cards.load(name)
    assert card.classes == 1000
    assert (card.labels[0], card.labels[281], card.labels[999]) == (
        "tench",
        "tabby",
        "toilet tissue",
    )


def test_digits_are_named_by_themselves() -> None:
    assert cards.load("lenet5").labels == tuple("0123456789")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_weights_are_named_with_the_beginning_of_their_hash(name: str) -> None:
    source = cards.load(name).weights
    assert re.fullmatch(rf"https://.+/{name}\S*-[0-9a-f]{{8}}\.pth", source)


def test_a_network_without_public_weights_does_not_claim_any() -> None:
    assert {n for n in cards.names() if cards.load(n).weights.startswith("random:")} == (
        set(cards.names()) - PUBLIC - {"lenet5"}
    )


@pytest.mark.parametrize("name", sorted(set(cards.names()) - {"lenet5"}))
def test_pictures_are_prepared_as_the_public_weights_expect(name: str) -> None:
    card = cards.load(name)
    side = 227 if name == "alexnet2012" else 224
    assert card.input.shape == (side, side, 3)
    assert (card.input.resize, card.input.interpolation) == (256, "bilinear")
    if name == "googlenet":  # black is -1, white is 1
        assert [(0 - m) / s for m, s in zip(card.mean, card.std, strict=True)] == [-1, -1, -1]
        assert [(1 - m) / s for m, s in zip(card.mean, card.std, strict=True)] == [1, 1, 1]
    else:
        assert card.mean == (0.485, 0.456, 0.406)
        assert card.std == (0.229, 0.224, 0.225)


def test_the_hash_of_a_card_is_that_of_its_file(tmp_path: Path) -> None:
    first = changed(tmp_path, "max_batch = 64\n", "max_batch = 32\n")
    second = changed(tmp_path, "max_batch = 64\n", "max_batch = 31\n")
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256
    assert (first.max_batch, second.max_batch) == (32, 31)


def test_a_card_may_have_labels_and_classes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "shapes.txt").write_text("round\nsquare\n")
    (tmp_path / "mine.toml").write_text(LENET5.replace("digits.txt", "shapes.txt"))
    assert cards.load("mine", tmp_path, labels=tmp_path).labels == ("round", "square")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('labels = "digits.txt"', 'label = "digits.txt"', "unknown key label; there are arch"),
        ("resize = 0", "resise = 0", "unknown key input.resise; there are height"),
        ("[batch]\nmax_batch = 64", "[batch]", "batch.max_batch is missing"),
        ("opt_batch = 256\n", "", "gpu.opt_batch is missing"),
        ("opt_batch = 256", "opt_batch = 1025", "gpu.opt_batch must be 1 to gpu.max_batch, 1024"),
        ("max_batch = 1024", "max_batch = 2048", "gpu.max_batch must be 1 to 1024, not 2048"),
        ('weights = "digits"', "", "weights is missing"),
        ("[input]", "[[input]]", "input must be of type dict, not"),
        ("max_batch = 64", "max_batch = 64.0", "batch.max_batch must be of type int, not 64.0"),
        ("max_batch = 64", "max_batch = true", "batch.max_batch must be of type int, not True"),
        ("max_batch = 64", "max_batch = 0", "max_batch must be 1 to 1024, not 0"),
        ("mean = [0.3]", "mean = [0.3, 0.3]", r"mean must be 1 finite numbers, not \[0.3, 0.3\]"),
        ("mean = [0.3]", "mean = [nan]", r"mean must be 1 finite numbers, not \[nan\]"),
        ("mean = [0.3]", 'mean = ["0.3"]', r"input.mean must be numbers, not \['0.3'\]"),
        ("std = [0.35]", "std = [0]", r"std must be above 0, not \[0.0\]"),
        ("objective_ms = 5", "objective_ms = 0", "objective_ms must be above 0, not 0.0"),
        ("objective_ms = 5", "objective_ms = inf", "objective_ms must be above 0, not inf"),
        ("share = 1", "share = 0", "share must be 0.01 to 100, not 0.0"),
        ("share = 1", "share = nan", "share must be 0.01 to 100, not nan"),
        ('weights = "digits"', 'weights = ""', "weights must say"),
        ('"lenet5"', '"lenet6"', "'lenet6' is unknown; there are alexnet"),
        ("height = 32", "height = 28", "lenet5 takes 32x32x1 pixels, not 28x32x1"),
        ("channels = 1", "channels = 3", "lenet5 takes 32x32x1 pixels, not 32x32x3"),
        ('"bilinear"', '"guess"', "interpolation must be one of nearest, .*, not 'guess'"),
        ('"digits.txt"', '"../cards/lenet5.toml"', "is no file of labels/; there are"),
        ("[input]", "[input", "card mine.toml: "),
    ],
)
def test_a_wrong_card_is_refused_with_what_is_wrong(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    with pytest.raises(CardError, match=complaint):
        changed(tmp_path, old, new)


def test_a_card_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CardError, match=r"card mine\.toml: "):
        cards.load("mine", tmp_path)


@pytest.mark.parametrize("name", ["resnet19", "../cards/lenet5", "", "lenet5.toml"])
def test_an_unknown_card_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(CardError, match="there are alexnet, .*, vgg16"):
        cards.load(name)


@pytest.mark.parametrize("name", ["Mine", "my model", ".mine"])
def test_a_card_whose_name_could_not_be_a_folder_or_an_argument_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.toml").write_text(LENET5)
    with pytest.raises(CardError, match="name must match"):
        cards.load(name, tmp_path)


def test_labels_with_an_empty_line_are_refused(tmp_path: Path) -> None:
    (tmp_path / "digits.txt").write_text("0\n\n2\n")
    (tmp_path / "mine.toml").write_text(LENET5)
    with pytest.raises(CardError, match="labels must name every class"):
        cards.load("mine", tmp_path, labels=tmp_path)
