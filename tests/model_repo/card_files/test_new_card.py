"""A card is written for a checkpoint: its network, its classes, its label file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model_repo import build, cards
from model_repo.architectures.registry import create


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path: Path, architecture: str = "lenet5", classes: int = 3) -> None:
    state = create(architecture, classes).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def test_a_new_card_names_the_network_and_builds_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs").mkdir()
    save(folder / "runs/best.pth")
    assert build.main(["--new-card", "food.toml", "--from", "runs/best.pth"]) == 0
    printed = capsys.readouterr().out
    assert "food.toml: lenet5 with 3 classes" in printed
    assert "Write food.txt: 3 names, one per line" in printed
    assert printed.endswith("convserve build food.toml\n")
    (folder / "food.txt").write_text("bread\nrice\nsoup\n")
    card = cards.load("food.toml")
    assert (card.name, card.architecture, card.classes) == ("food", "lenet5", 3)
    assert card.weights == f"file:{folder}/runs/best.pth"
    assert card.input == cards.load("lenet5").input
    assert build.main(["food.toml", "--repo", "repo", "--backend", "null"]) == 0


@pytest.mark.parametrize("architecture", ["resnet18", "googlenet"])
def test_every_comment_in_the_card_is_a_valid_line(folder: Path, architecture: str) -> None:
    save(folder / "food.pth", architecture)
    (folder / "food.txt").write_text("bread\nrice\nsoup\n")
    assert build.main(["--new-card", "food.toml", "--from", "food.pth"]) == 0
    text = (folder / "food.toml").read_text()
    lines = text.splitlines()
    said = [line.removeprefix("# ") for line in lines if "=" in line or line.startswith("# [")]
    (folder / "all.toml").write_text("\n".join(said))
    whole, short = cards.load("./all.toml"), cards.load("./food.toml")
    assert (whole.activation, short.activation) == ("sigmoid", "softmax")
    assert (whole.input, whole.mean, whole.std) == (short.input, short.mean, short.std)
    assert whole.top_k == short.top_k == 3


def test_a_label_file_beside_the_checkpoint_is_used_if_its_number_fits(folder: Path) -> None:
    (folder / "run").mkdir()
    save(folder / "run/model.pth")
    (folder / "run/labels.txt").write_text("one\ntwo\n")
    names = {"0": "bread", "1": "rice", "2": "soup"}
    (folder / "run/config.json").write_text(json.dumps({"id2label": names}))
    assert build.main(["--new-card", "food.toml", "--from", "run/model.pth"]) == 0
    assert cards.load("food.toml").labels == ("bread", "rice", "soup")


def test_an_existing_card_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder / "food.pth")
    (folder / "food.toml").write_text("mine")
    command = ["--new-card", "food.toml", "--from", "food.pth"]
    assert build.main(command) == 1
    assert (
        "food.toml exists already; choose another name, or add --force" in capsys.readouterr().err
    )
    assert (folder / "food.toml").read_text() == "mine"
    assert build.main([*command, "--force"]) == 0
    assert 'base = "lenet5"' in (folder / "food.toml").read_text()


def test_a_checkpoint_that_is_not_recognised_gets_no_card(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, words in (
        ({"a": torch.zeros(3)}, "is not recognised: it looks like none of ours; its names"),
        ({"epoch": 3}, "contains no tensors by name but 'epoch'"),
    ):
        torch.save(content, "food.pth")
        assert build.main(["--new-card", "food.toml", "--from", "food.pth"]) == 1
        assert words in capsys.readouterr().err
    state = create("lenet5", 3).state_dict()
    torch.save({name: state[name] for name in state if not name.startswith("11.")}, "food.pth")
    assert build.main(["--new-card", "food.toml", "--from", "food.pth"]) == 1
    assert "food.pth is lenet5 without a last layer" in capsys.readouterr().err
    assert build.main(["--new-card", "food.toml", "--from", "gone.pth"]) == 1
    assert "there is no checkpoint gone.pth" in capsys.readouterr().err
    assert not (folder / "food.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-card", "a.toml"], "--new-card needs --from CHECKPOINT"),
        (["lenet5", "--new-card", "a.toml", "--from", "a.pth"], "--new-card only writes a card"),
        (["lenet5", "--from", "a.pth"], "--from belongs to --new-card"),
        (["lenet5", "--force"], "--force belongs to --new-card"),
    ],
)
def test_wrong_usage_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert message in capsys.readouterr().err
