"""The GPU's lane is one command: without a GPU it compiles, and what measures is run on null."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from server.engines import tensorrt
from tests import gpu_lane
from tests.gpu_measure import multiplications_of

ROOT = Path(__file__).resolve().parent.parent


def lane(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The results and their table."""
    command = [sys.executable, "-m", "tests.gpu_lane", "--out", str(out), "--models", "lenet5"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="this machine has a GPU")
def test_without_a_gpu_every_network_is_compiled_and_the_lane_says_so(tmp_path: Path) -> None:
    results, table = lane(tmp_path)
    (tried,) = results["tried"]
    assert not tried["runs"]
    assert "no NVIDIA driver" in tried["why"]
    assert results["machine"]["gpu"] is None
    assert results["plans"]["lenet5"]["plan_bytes"] > 100_000
    assert not results["models"], "nothing was measured, so nothing is told"
    assert "GPU: none, this machine has no NVIDIA driver" in table


def test_what_checks_and_measures_runs_with_any_engine(tmp_path: Path) -> None:
    options = ("--backend", "null", "--precisions", "fp32", "--seconds", "0.1")
    results, table = lane(tmp_path, *options)
    assert results["failed"] == results["skipped"] == []
    found = results["models"]["lenet5 fp32"]
    assert set(found["parity"].values()) == {0.0}
    assert [row["batch"] for row in found["speed"]] == [1, 8, 32]
    assert all(row["p50_ms"] <= row["p99_ms"] for row in found["speed"])
    assert [row["images_a_call"] for row in results["served"]] == [1, 8, 64]
    for row in results["served"]:
        assert row["images_hz"] > 0
        assert row["ratio"] == pytest.approx(row["images_hz"] / row["bare_hz"])
    assert "| lenet5 fp32 | the engine | 32 |" in table


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    options = ("--backend", "null", "--precisions", "fp32", "--minutes", "0")
    results, table = lane(tmp_path, *options)
    assert results["skipped"] == ["lenet5 fp32 built", "served"]
    assert "no time was left for: lenet5 fp32 built, served" in table


def test_wheels_are_unpacked_unless_installed_and_versions_tried_in_order(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    names = ["numpy-1.0", "absent_thing-1.0"]
    names += [f"tensorrt_rtx_cu13_libs-{version}" for version in ("9.9", *sorted(gpu_lane.RTX))]
    for name in names:
        with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}/__init__.py", "")
    packages = tmp_path / "out" / "packages"
    versions = gpu_lane._unpack(wheels, packages)
    assert list(versions) == [*gpu_lane.RTX, "9.9"]
    assert [path.name for path in packages.iterdir()] == ["absent_thing"], "numpy is installed"
    assert all((folder / "tensorrt_rtx_cu13_libs").is_dir() for folder in versions.values())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet50", 4.089), ("vgg16", 15.47), ("googlenet", 1.498), ("alexnet", 0.714)],
)
def test_multiplications_are_those_published_for_the_public_weights(
    name: str, billions: float
) -> None:
    """https://pytorch.org/vision/stable/models.html, GFLOPS there being multiply-accumulates."""
    assert multiplications_of(name) / 1e9 == pytest.approx(billions, rel=2e-3)
