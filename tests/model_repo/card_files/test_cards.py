"""Every network has a card. A wrong card is rejected with a message about the mistake."""

import re
from pathlib import Path

import pytest

from model_repo import cards
from model_repo.architectures.registry import architecture_names
from model_repo.cards import CardError

PUBLIC = {  # networks with public weights
    *("alexnet", "vgg16", "googlenet"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
}
IMAGENET = PUBLIC | {"alexnet2012", "googlenet2014", "plain18", "plain34"}

LENET5 = (cards.CARDS_FOLDER / "lenet5.toml").read_text()


def changed(folder: Path, old: str, new: str) -> cards.Card:
    """The LeNet-5 card with one change, under another name."""
    assert old in LENET5
    (folder / "mine.toml").write_text(LENET5.replace(old, new))
    return cards.load("mine", folder)


def test_every_network_has_a_card_with_its_name() -> None:
    for name in architecture_names():
        assert cards.load(name).architecture == name


@pytest.mark.parametrize("name", sorted(IMAGENET))
def test_imagenet_networks_have_a_thousand_class_names(name: str) -> None:
    card = cards.load(name)
    assert card.classes == 1000
    assert (card.labels[0], card.labels[281], card.labels[999]) == (
        "tench",
        "tabby",
        "toilet tissue",
    )


def test_the_class_names_of_digits_are_the_digits() -> None:
    assert cards.load("lenet5").labels == tuple("0123456789")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_url_of_public_weights_contains_the_start_of_their_hash(name: str) -> None:
    source = cards.load(name).weights
    assert re.fullmatch(rf"https://.+/{name}\S*-[0-9a-f]{{8}}\.pth", source)


@pytest.mark.parametrize("name", sorted(IMAGENET - PUBLIC))
def test_networks_without_public_weights_have_random_ones(name: str) -> None:
    assert cards.load(name).weights.startswith("random:")


@pytest.mark.parametrize("name", sorted(IMAGENET))
def test_images_are_prepared_as_the_public_weights_expect(name: str) -> None:
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


def test_the_hash_of_a_card_depends_on_its_file(tmp_path: Path) -> None:
    first = changed(tmp_path, "max_batch = 64\n", "max_batch = 32\n")
    second = changed(tmp_path, "max_batch = 64\n", "max_batch = 31\n")
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256
    assert (first.max_batch, second.max_batch) == (32, 31)


def test_a_card_can_use_its_own_label_file(tmp_path: Path) -> None:
    (tmp_path / "shapes.txt").write_text("round\nsquare\n")
    (tmp_path / "mine.toml").write_text(LENET5.replace("digits.txt", "shapes.txt"))
    assert cards.load("mine", tmp_path, labels=tmp_path).labels == ("round", "square")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'labels = "digits.txt"',
            'label = "digits.txt"',
            "unknown field `label`.* The keys of a card are arch",
        ),
        ("resize = 0", "resise = 0", r"unknown field `resise` - at `\$.input`.* input.resize"),
        (
            "[batch]\nmax_batch = 64",
            "[batch]",
            r"missing required field `max_batch` - at `\$.batch`",
        ),
        ("opt_batch = 256\n", "", r"missing required field `opt_batch` - at `\$.gpu`"),
        ("opt_batch = 256", "opt_batch = 1025", "gpu.opt_batch must be 1 to gpu.max_batch, 1024"),
        ("max_batch = 1024", "max_batch = 2048", "gpu.max_batch must be 1 to 1024, not 2048"),
        ('weights = "digits"', "", "missing required field `weights`"),
        ("[input]", "[[input]]", r"Expected `object`, got `array` - at `\$.input`"),
        (
            "max_batch = 64",
            "max_batch = 64.0",
            r"Expected `int`, got `float` - at `\$.batch.max_batch`",
        ),
        (
            "max_batch = 64",
            "max_batch = true",
            r"Expected `int`, got `bool` - at `\$.batch.max_batch`",
        ),
        ("max_batch = 64", "max_batch = 0", "batch.max_batch must be 1 to 1024, not 0"),
        ("mean = [0.3]", "mean = [0.3, 0.3]", r"mean must be 1 finite numbers, not \[0.3, 0.3\]"),
        ("mean = [0.3]", "mean = [nan]", r"input.mean must be 1 finite numbers, not \[nan\]"),
        (
            "mean = [0.3]",
            'mean = ["0.3"]',
            r"Expected `float`, got `str` - at `\$.input.mean\[0\]`",
        ),
        ("std = [0.35]", "std = [0]", r"std must be above 0, not \[0.0\]"),
        ("objective_ms = 5", "objective_ms = 0", "objective_ms must be above 0, not 0.0"),
        ("objective_ms = 5", "objective_ms = inf", "objective_ms must be above 0, not inf"),
        ("share = 1", "share = 0", "share must be 0.01 to 100, not 0.0"),
        ("share = 1", "share = nan", "share must be 0.01 to 100, not nan"),
        ('weights = "digits"', 'weights = ""', "weights must not be empty"),
        ('"lenet5"', '"lenet6"', "'lenet6' is unknown; choose one of alexnet"),
        ("height = 32", "height = 28", "input of lenet5 must be 32x32x1, not 28x32x1"),
        ("channels = 1", "channels = 3", "input of lenet5 must be 32x32x1, not 32x32x3"),
        ('"bilinear"', '"guess"', "interpolation must be one of nearest, .*, not 'guess'"),
        (
            '"digits.txt"',
            '"../cards/lenet5.toml"',
            r"labels must be a list of names or a label file; there is no .*\(ours: digits",
        ),
        ("[input]", "[input", "card mine.toml: "),
    ],
)
def test_the_message_about_a_wrong_card_names_the_mistake(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(CardError, match=message):
        changed(tmp_path, old, new)


def test_a_card_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(LENET5.encode() + "# für Läden".encode("latin-1"))
    line = LENET5.count("\n") + 1
    with pytest.raises(CardError, match=rf"card mine\.toml: line {line} is not UTF-8 text; save"):
        cards.load("mine", tmp_path)


@pytest.mark.parametrize("name", ["resnet19", ""])
def test_the_message_about_an_unknown_card_lists_the_known_ones(name: str) -> None:
    with pytest.raises(CardError, match="cards: alexnet, .*, vgg16"):
        cards.load(name)


@pytest.mark.parametrize("name", ["Mine", "my model"])
def test_a_card_name_must_be_usable_as_a_folder_and_an_argument(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.toml").write_text(LENET5)
    with pytest.raises(CardError, match="name must match"):
        cards.load(name, tmp_path)


def test_the_message_about_a_wrong_label_file_names_the_card_the_file_and_the_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "digits.txt").write_text("0\n\n2\n")
    (tmp_path / "mine.toml").write_text(LENET5)
    message = r"card mine\.toml: labels in digits\.txt: line 2 is empty; each line must be"
    with pytest.raises(CardError, match=message):
        cards.load("mine", tmp_path, labels=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        LENET5.encode("utf-8-sig"),
        LENET5.replace("\n", "\r\n").encode("utf-8-sig"),
        LENET5.replace("\n", "\r\n").encode("utf-16"),
        LENET5.replace("\n", "\r").encode(),
        LENET5.replace("\n", " \t\n").encode(),
        LENET5.replace('"lenet5"', '"lenet5 "').replace('"digits"', '" digits"').encode(),
        LENET5.replace('"digits.txt"', '"digits.txt "').encode(),
        LENET5.replace('"bilinear"', '" bilinear"').encode(),
    ],
)
def test_a_card_is_read_whatever_the_editor_adds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    card, original = cards.load("mine", tmp_path), cards.load("lenet5")
    assert (card.architecture, card.weights) == (original.architecture, original.weights)
    assert (card.labels, card.input) == (original.labels, original.input)


def test_files_that_editors_and_macos_leave_are_no_cards_and_no_labels(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(LENET5)
    for name in ("._mine.toml", ".#mine.toml", "._digits.txt"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert cards.names(tmp_path) == ["mine"]
    with pytest.raises(CardError, match=r"there is no file 'digits.txt' \(ours: none\)"):
        cards.load("mine", tmp_path, labels=tmp_path)
