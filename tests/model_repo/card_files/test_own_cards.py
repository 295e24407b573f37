"""A user's own card: anywhere, short, with paths relative to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_repo import build, cards, pipeline
from model_repo.architectures.registry import create
from model_repo.cards import CardError
from server.images.input_spec import InputSpec
from server.repository import reader
from server.repository.contents import list_versions

FOOD = 'base = "resnet50"\nweights = "food.pth"\nlabels = "food.txt"\n'
NAMES = ("bread", "rice", "soup")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "food.txt").write_text("\n".join(NAMES))
    return folder


def food(folder: Path, more: str = "", text: str = FOOD) -> cards.Card:
    (folder / "food.toml").write_text(text + more)
    return cards.load(str(folder / "food.toml"))


def test_a_card_takes_from_its_base_what_it_does_not_say(folder: Path) -> None:
    card, base = food(folder), cards.load("resnet50")
    assert (card.name, card.labels) == ("food", NAMES)
    assert card.weights == f"file:{folder}/food.pth"
    assert (card.architecture, card.input, card.mean, card.std) == (
        "resnet50",
        base.input,
        base.mean,
        base.std,
    )
    assert (card.max_batch, card.objective_ms, card.share) == (8, 100, 1)
    assert (card.top_k, card.activation, card.channel_order) == (3, "softmax", "rgb")
    assert card.sha256 != base.sha256


def test_files_are_found_beside_the_card_and_not_in_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    food(folder)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "food.txt").write_text("wrong")
    card = cards.load("models/food.toml")
    assert card.labels == NAMES
    assert card.weights == f"file:{folder}/food.pth"


@pytest.mark.parametrize(
    ("weights", "loaded"),
    [
        ("file:food.pth", "file:{folder}/food.pth"),
        ("sub/food", "file:{folder}/sub/food"),
        ("/data/food.pth", "file:/data/food.pth"),
        ("~/food.pth", "file:~/food.pth"),
        ("digits", "digits"),
        ("random:0", "random:0"),
        ("https://host/food-12345678.pth", "https://host/food-12345678.pth"),
        ("file:///data/food-12345678.pth", "file:///data/food-12345678.pth"),
    ],
)
def test_weights_are_a_path_or_a_source(folder: Path, weights: str, loaded: str) -> None:
    card = food(folder, text=FOOD.replace("food.pth", weights))
    assert card.weights == loaded.format(folder=folder)


def test_a_base_can_be_a_card_of_the_user_with_files_of_its_own(folder: Path) -> None:
    food(folder, '[input]\nheight = 192\nchannel_order = "bgr"\n')
    other = folder / "other"
    other.mkdir()
    (other / "spicy.toml").write_text(
        'base = "../food.toml"\nname = "hot"\nlabels = ["mild", "hot"]\n[input]\nwidth = 160\n'
    )
    card = cards.load(str(other / "spicy.toml"))
    assert (card.name, card.labels, card.architecture) == ("hot", ("mild", "hot"), "resnet50")
    assert Path(card.weights.removeprefix("file:")).resolve() == folder / "food.pth"
    assert (card.input.shape, card.channel_order) == ((192, 160, 3), "bgr")
    first = card.sha256
    food(folder, '[input]\nheight = 224\nchannel_order = "bgr"\n')
    assert cards.load(str(other / "spicy.toml")).sha256 != first, "its base counts too"


def test_a_label_file_of_ours_is_found_by_its_name(folder: Path) -> None:
    assert food(folder, text=FOOD.replace("food.txt", "imagenet.txt")).classes == 1000
    (folder / "imagenet.txt").write_text("mine\n")
    assert food(folder, text=FOOD.replace("food.txt", "imagenet.txt")).labels == ("mine",)


def test_every_option_of_the_input_can_be_set(folder: Path) -> None:
    card = food(
        folder,
        'activation = "sigmoid"\ntop_k = 2\n'
        '[input]\nheight = 240\nwidth = 320\nresize = "letterbox"\nfill = [10, 20, 30]\n'
        'interpolation = "bicubic"\nantialias = false\nchannel_order = "bgr"\n'
        "mean = [103.939, 116.779, 123.68]\nstd = [1, 1, 1]\nscale = 255\n",
    )
    assert (card.activation, card.top_k, card.channel_order) == ("sigmoid", 2, "bgr")
    assert card.input.shape == (240, 320, 3)
    assert (card.input.letterbox, card.input.fill, card.input.resize) == (True, (10, 20, 30), 0)
    assert (card.input.interpolation, card.input.antialias) == ("bicubic", False)
    assert card.mean == pytest.approx((0.407604, 0.457957, 0.485020), abs=1e-6)
    assert card.std == pytest.approx((1 / 255,) * 3)
    exact = food(folder, '[input]\nresize = "exact"\n')
    assert (exact.input.letterbox, exact.input.resize) == (False, 0)


def test_a_resize_that_is_too_small_for_a_new_size_grows_with_it(folder: Path) -> None:
    kept = food(folder, "[input]\nheight = 240\nwidth = 240\n")
    assert (kept.input.resize, kept.notes) == (256, ())
    grown = food(folder, "[input]\nheight = 448\nwidth = 320\n")
    assert grown.input.resize == 512
    assert grown.notes[0].startswith("input.resize is 512: the base's 256 is smaller than the")
    said = food(folder, "[input]\nheight = 448\nwidth = 448\nresize = 448\n")
    assert (said.input.resize, said.notes) == (448, ())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("top_k = 4", "top_k must be 1 to 3, the classes, not 4"),
        ("top_k = -1", "top_k must be 1 to 3, the classes, not -1"),
        ('activation = "relu"', "activation must be one of softmax, sigmoid, not 'relu'"),
        ('[input]\nchannel_order = "gbr"', "channel_order must be one of rgb, bgr, not 'gbr'"),
        ('[input]\nresize = "squash"', "resize must be the shorter side in pixels, exact or lett"),
        ("[input]\nresize = -1", "resize must be 0 or a side in pixels, not -1"),
        ('[input]\nresize = "letterbox"\nfill = 256', "fill must be one number from 0 to 255, or"),
        ("[input]\nfill = [1, 2]", "fill must be one number from 0 to 255, or 3 of them"),
        ("[input]\nscale = 255", "input.scale needs input.mean and input.std beside it"),
        (
            "[input]\nscale = 2\nmean = [0, 0, 0]\nstd = [1, 1, 1]",
            "input.scale must be 1 or 255, not 2",
        ),
        ('[input]\ninterpolation = "lanczos"\nantialias = false', "lanczos always smooths"),
        ("[input]\nchannels = 1\nmean = [0]\nstd = [1]", "input of resnet50 must have 3 channels"),
        ("[input]\nheight = 0", "height and width must be at least 1, not 0 x 224"),
        ("[input]\nhight = 240", r"unknown field `hight` - at `\$.input`.* input.height"),
        (f"deep = {'[' * 5000}", "tables or lists in it are too deep"),
        ("clases = 3", "unknown field `clases`.* The keys of a card are architecture"),
    ],
)
def test_a_wrong_value_is_named(folder: Path, more: str, message: str) -> None:
    with pytest.raises(CardError, match=message) as caught:
        food(folder, more)
    assert str(caught.value).startswith("card food.toml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FOOD.replace("resnet50", "resnet"), "base: there is no card 'resnet'; cards: alexnet"),
        (FOOD.replace("resnet50", "gone.toml"), r"base: card .*gone\.toml can't be read: No such"),
        (FOOD.replace("resnet50", "food.toml"), "base 'food.toml' leads back to this card"),
        (FOOD.replace("food.txt", "gone.txt"), "there is no file 'gone.txt'"),
        ('architecture = "resnet50"\n', "missing required field `weights`"),
    ],
)
def test_a_card_that_refers_to_nothing_is_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(CardError, match=message):
        food(folder, text=text)


def test_a_missing_card_and_a_folder_are_named(folder: Path) -> None:
    with pytest.raises(CardError, match=r"card .*gone\.toml can't be read: No such file"):
        cards.load(str(folder / "gone.toml"))
    with pytest.raises(CardError, match="can't be read: Is a directory"):
        cards.load(f"{folder}/")


def test_the_file_of_a_network_needs_no_base(folder: Path) -> None:
    text = (
        'architecture = "net.py:build"\nweights = "food.pth"\nlabels = "food.txt"\n[input]\n'
        'height = 64\nwidth = 48\nchannels = 1\nresize = "exact"\ninterpolation = "bilinear"\n'
        "mean = [0]\nstd = [1]\n"
    )
    card = food(folder, text=text)
    assert (card.architecture, card.network_file) == (
        f"{folder}/net.py:build",
        folder / "net.py",
    )
    assert (card.max_batch, card.gpu_max_batch, card.objective_ms) == (8, 256, 100)
    assert food(folder, text=text.replace("net.py:build", "net.onnx")).network_file == (
        folder / "net.onnx"
    )


def test_the_file_of_a_network_brings_its_weights_and_does_not_take_those_of_the_base(
    folder: Path,
) -> None:
    card = food(folder, text='base = "resnet50"\narchitecture = "net.onnx"\nlabels = "food.txt"\n')
    assert card.weights == f"file:{folder}/net.onnx"
    assert card.input == cards.load("resnet50").input


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(create("lenet5", 3).state_dict(), tmp_path / "food.pth")
    (tmp_path / "food.txt").write_text("bread\nrice\nsoup\n")
    (tmp_path / "food.toml").write_text(FOOD.replace("resnet50", "lenet5"))
    return tmp_path


def test_the_command_builds_cards_by_path_and_by_name(
    digits_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_folder)
    assert build.main(["food.toml", "lenet5", "--repo", "repo", "--backend", "null"]) == 0
    options = ["--base", "lenet5", "--weights", "food.pth", "--labels", "food.txt"]
    assert build.main(["--name", "no-card", *options, "--repo", "repo"]) == 0
    found: dict[str, Any] = {entry.model: entry for entry in list_versions(Path("repo"))}
    assert sorted(found) == ["food", "lenet5", "no-card"]
    for name in ("food", "no-card"):
        assert reader.open_version(found[name].folder).labels == NAMES
    manifest = found["no-card"].manifest
    assert (manifest.classes, manifest.top_k, manifest.weights.trained) == (3, 3, True)


def test_two_cards_with_one_file_name_are_both_built(
    digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_folder)
    (digits_folder / "b").mkdir()
    text = (digits_folder / "food.toml").read_text()
    other = text.replace("food.", "../food.") + 'name = "more"\n'
    (digits_folder / "b/food.toml").write_text(other)
    command = ["food.toml", "b/food.toml", "--repo", "repo", "--backend", "null"]
    assert build.main(command) == 0
    assert sorted(entry.model for entry in list_versions(Path("repo"))) == ["food", "more"]


def test_a_network_with_its_own_size_order_and_activation_is_built(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = create("resnet18", 3).eval()
    torch.save(network.state_dict(), tmp_path / "food.pth")
    (tmp_path / "food.txt").write_text("bread\nrice\nsoup\n")
    text = FOOD.replace("resnet50", "resnet18") + (
        'activation = "sigmoid"\ntop_k = 2\n[input]\nheight = 64\nwidth = 48\n'
        'channel_order = "bgr"\nresize = "letterbox"\nfill = 114\n'
    )
    (tmp_path / "food.toml").write_text(text)
    repo = tmp_path / "repo"
    manifest = pipeline.build(
        str(tmp_path / "food.toml"), pipeline.BuildOptions(repo=repo)
    ).manifest
    assert (manifest.top_k, manifest.activation, manifest.classes) == (2, "sigmoid", 3)
    assert manifest.input.spec() == InputSpec(64, 48, 3, letterbox=True, fill=(114,))
    assert (manifest.input.channel_order, manifest.input.mean[0]) == ("bgr", 0.485)
    contents = reader.open_version(repo / "food" / "1")
    golden, card = contents.golden, cards.load(str(tmp_path / "food.toml"))
    blue_first = torch.from_numpy(golden.pixels[..., ::-1].copy()).float() / 255
    normalised = (blue_first - torch.tensor(card.mean)) / torch.tensor(card.std)
    with torch.inference_mode():
        expected = network(normalised.permute(0, 3, 1, 2)).sigmoid().numpy()
    np.testing.assert_allclose(golden.probabilities, expected, atol=1e-5)


def test_another_engine_is_added_by_the_path_of_the_card(
    digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_folder)
    assert build.main(["./food.toml", "--repo", "repo", "--precision", "fp32"]) == 0
    assert build.main(["food.toml", "--repo", "repo", "--precision", "fp32", "--add-engine"]) == 1
    (entry,) = list_versions(Path("repo"))
    assert entry.manifest is not None
    assert (entry.manifest.version, len(entry.manifest.engines)) == (1, 1)
