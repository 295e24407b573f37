"""`convserve evaluate`: a real engine, real images, and the numbers that follow from them."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convserve_client import AsyncClient
from model_repo.evaluate import main
from model_repo.evaluation.local import opened_engine
from server.app.lifecycle import running
from server.engines.base import infer
from server.images.decode import decode
from server.repository.contents import list_versions
from server.repository.evaluation import EVALUATION_FILE, read_evaluation
from tests.support.server_process import local_settings


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The results that --json prints."""
    assert main(["lenet5", "--json", *map(str, arguments)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def answers_by_hand(repo: Path, files: list[Path]) -> np.ndarray:
    """The best class of each file, one image at a time."""
    (entry,) = (entry for entry in list_versions(repo) if entry.model == "lenet5")
    assert entry.manifest is not None
    spec = entry.manifest.input.spec()
    with opened_engine(entry.folder, entry.manifest) as (engine, _):
        rows = [decode(file.read_bytes(), spec)[np.newaxis] for file in files]
        return np.array([infer(engine.instances[0], row).classes[0, 0] for row in rows])


def test_the_evaluation_of_the_digits_equals_one_by_hand(
    built_repository: Path, digit_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(
        capsys, "--data", digit_files, "--repo", built_repository, "--against", "eager"
    )
    files = sorted(digit_files.glob("*/*.png"))
    truth = np.array([int(file.parent.name) for file in files])
    answers = answers_by_hand(built_repository, files)
    assert found["images"] == len(files)
    assert found["top1"] == pytest.approx(float((answers == truth).mean()))
    for score in found["scores"]["classes"]:
        of_class, named = truth == score["index"], answers == score["index"]
        right = int((of_class & named).sum())
        assert score["recall"] == pytest.approx(right / of_class.sum())
        assert score["precision"] == pytest.approx(right / named.sum())
    (against_eager,) = found["comparisons"]
    assert against_eager["agreement"] > 0.99
    assert not against_eager["p_value"] < 0.05


def test_a_server_gives_the_same_result_and_shows_what_was_recorded(
    built_repository: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(built_repository / "lenet5", repo / "lenet5")
    local = evaluate(capsys, "--data", digit_files, "--repo", repo, "--record")
    record = read_evaluation(repo / "lenet5" / "1")
    assert record is not None
    assert (record.top1, record.images) == (local["top1"], local["images"])

    async def ask() -> tuple[dict[str, Any], Any]:
        async with running(local_settings(repo)) as server:
            target = f"127.0.0.1:{server.port}"
            async with AsyncClient(target) as client:
                await client.wait_ready(60, model="lenet5")
                described = (await client.list_models())[0]
            options = "--data", digit_files, "--server", target
            return await asyncio.to_thread(evaluate, capsys, *options), described

    remote, described = asyncio.run(ask())
    assert remote["top1"] == local["top1"]
    assert remote["scores"]["classes"] == local["scores"]["classes"]
    assert described.evaluation.top1 == local["top1"]
    assert described.evaluation.data == digit_files.name


def test_files_that_cannot_be_read_are_named(
    built_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("3/a.png", "4/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (8, 8), 40).save(tmp_path / name)
    (tmp_path / "3" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "3" / "notes.txt").write_text("ignored")
    arguments = ["lenet5", "--data", str(tmp_path), "--repo", str(built_repository), "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["images"], found["ignored_files"]) == (2, 1)
    assert "broken.jpg" in found["unreadable_files"][0]
    assert "broken.jpg" in captured.err
    assert "notes.txt" in captured.err


def test_the_report_is_one_page_that_needs_nothing_else(
    built_repository: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "data" / "7"
    wrong.mkdir(parents=True)
    for file in sorted((digit_files / "1").iterdir())[:5]:  # ones that claim to be sevens
        shutil.copy(file, wrong / f"<{file.name}")
    page = tmp_path / "report.html"
    arguments = ["--data", wrong.parent, "--repo", built_repository, "--report", page]
    found = evaluate(capsys, *arguments)
    text = page.read_text("utf-8")
    assert found["top1"] == 0
    assert text.count("<figure>") == 5
    assert "data:image/png;base64," in text
    assert "&lt;" in text  # file names are escaped
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in text.replace("https://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "has no model 'missing'"),
        (["lenet5", "--version", "9"], "has no valid version 9 of lenet5; it has 1"),
        (["lenet5", "--engine", "tensorrt-fp16"], "there is no engine 'tensorrt-fp16'"),
        (["lenet5", "--against", "7"], "has no valid version 7"),
        (["resnet18", "--against", "eager", "--weights", "random:1"], "neither a label"),
        (["lenet5", "--against", "eager", "--weights", "random:1"], "was built from other weights"),
    ],
    ids=["model", "version", "engine", "against", "labels", "weights"],
)
def test_what_cannot_be_measured_is_explained(
    built_repository: Path,
    digit_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    data = digit_files
    if arguments[0] == "resnet18":
        data = tmp_path
        (tmp_path / "no such class").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "no such class" / "a.png")
    common = ["--data", str(data), "--repo", str(built_repository)]
    assert main([*arguments, *common]) == 1
    assert message in capsys.readouterr().err
    assert not list(built_repository.rglob(EVALUATION_FILE))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--against", "last"],
        ["--against", "eager", "--server", "127.0.0.1:1"],
        ["--record", "--server", "127.0.0.1:1"],
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lenet5", "--data", "val", *arguments])


def test_a_server_that_is_not_there_is_one_sentence(
    digit_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lenet5", "--data", str(digit_files), "--server", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lenet5 was not evaluated: --server 127.0.0.1:1: ")


def test_a_damaged_record_is_ignored(built_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(built_repository / "lenet5", tmp_path / "lenet5")
    (tmp_path / "lenet5" / "1" / EVALUATION_FILE).write_text('{"format": 1, "top1": 7}')
    (entry,) = list_versions(tmp_path)
    assert entry.manifest is not None
    assert entry.evaluation is None
