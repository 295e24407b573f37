"""Gates on publishing: what classifies badly is not published, and the message says by how much."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model_repo.build import main
from model_repo.evaluation.gate import Gate
from model_repo.pipeline import BuildError, BuildOptions, build
from server.repository.contents import list_versions


def gated(repo: Path, data: Path, *, weights: str | None = None, **gate: float) -> BuildOptions:
    return BuildOptions(repo=repo, weights=weights, gate=Gate(data=data, **gate))


def versions(repo: Path) -> list[int]:
    return [entry.version for entry in list_versions(repo)] if repo.is_dir() else []


def test_an_accurate_engine_is_published_and_a_worse_one_is_not(
    tmp_path: Path, digit_files: Path
) -> None:
    build("lenet5", gated(tmp_path, digit_files, min_top1=0.97))
    assert versions(tmp_path) == [1]
    # Random weights: as accurate as their own float32 network, but far below version 1.
    with pytest.raises(BuildError) as caught:
        build("lenet5", gated(tmp_path, digit_files, weights="random:0", min_top1=0.97))
    message = str(caught.value)
    assert versions(tmp_path) == [1]
    assert "nothing was published" in message
    too_low = re.search(r"top-1 is (0\.\d+), and --min-top1 is 0.97: (0\.\d+) too low", message)
    assert too_low
    assert float(too_low[1]) + float(too_low[2]) == pytest.approx(0.97, abs=1e-3)
    below = re.search(r"top-1 is 0\.\d+ below version 1, which is served", message)
    assert below
    assert "eager" not in message


def test_a_drop_that_is_allowed_is_published(tmp_path: Path, digit_files: Path) -> None:
    build("lenet5", BuildOptions(repo=tmp_path))
    build("lenet5", gated(tmp_path, digit_files, weights="random:0", max_drop=1.0))
    assert versions(tmp_path) == [2, 1]


def test_data_that_does_not_fit_stops_the_build_at_once(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="val does not exist"):
        build("lenet5", gated(tmp_path / "repo", tmp_path / "val"))
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-top1", "0.9"], "--min-top1 needs labelled images: add --data"),
        (["--data", "val", "--min-top1", "75"], "must be a fraction from 0 to 1, not 75"),
        (["--data", "val", "--add-engine"], "no effect with --add-engine"),
    ],
    ids=["no data", "percent", "add-engine"],
)
def test_wrong_usage(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["lenet5", "--repo", str(tmp_path), *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
