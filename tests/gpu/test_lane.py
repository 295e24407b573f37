"""The GPU lane as a command. Without a GPU it compiles; the null backend tests the measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.engines.tensorrt import backend as tensorrt
from tests.gpu import lane as gpu_lane

ROOT = Path(__file__).resolve().parent.parent.parent


def run_lane(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The results and the report."""
    command = [sys.executable, "-m", "tests.gpu.lane", "--out", str(out), "--models", "lenet5"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md"}
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="this machine has a GPU")
def test_without_a_gpu_every_network_is_compiled_and_the_report_says_so(tmp_path: Path) -> None:
    results, report = run_lane(tmp_path)
    (tried,) = results["tried"]
    assert not tried["runs"]
    assert "no NVIDIA driver" in tried["reason"]
    assert results["machine"]["gpu"] is None
    assert results["plans"]["lenet5"]["plan_bytes"] > 100_000
    assert not results["models"], "nothing was measured"
    assert "GPU: none, this machine has no NVIDIA driver" in report
    assert results["command"] == "python -m tests.gpu.lane --out DIR --models lenet5"


def test_checks_and_measurements_run_with_any_backend(tmp_path: Path) -> None:
    options = ("--backend", "null", "--precisions", "fp32", "--seconds", "0.1")
    results, report = run_lane(tmp_path, *options)
    assert results["failed"] == results["skipped"] == []
    found = results["models"]["lenet5 fp32"]
    assert set(found["deviation"].values()) == {0.0}
    assert [row["batch"] for row in found["speed"]] == [1, 8, 32]
    assert all(row["p50_ms"] <= row["p99_ms"] for row in found["speed"])
    assert [row["images_per_call"] for row in results["served"]] == [1, 8, 64]
    for row in results["served"]:
        assert row["images_hz"] > 0
        assert row["ratio"] == pytest.approx(row["images_hz"] / row["bare_hz"])
    assert "| lenet5 fp32 | the engine | 32 |" in report


def test_steps_without_time_left_are_listed(tmp_path: Path) -> None:
    options = ("--backend", "null", "--precisions", "fp32", "--minutes", "0")
    results, report = run_lane(tmp_path, *options)
    assert results["skipped"] == ["lenet5 fp32 built", "served"]
    assert "skipped, the time was up: lenet5 fp32 built, served" in report


@pytest.mark.parametrize(
    ("running", "installed", "chosen", "tried"),
    [
        ("", False, "1.6", ["installed", "1.6", "1.5"]),  # none: the first compiles without a GPU
        ("", True, None, ["installed", "1.6", "1.5"]),
        ("1.5", False, "1.5", ["installed", "1.6", "1.5"]),
        ("1.5", True, "1.5", ["installed", "1.6", "1.5"]),
        ("packages", True, None, ["installed"]),
    ],
)
def test_the_first_tensorrt_that_runs_is_chosen_or_else_the_first_that_exists(
    running: str, installed: bool, chosen: str | None, tried: list[str]
) -> None:
    versions = {name: Path(name) for name in ("1.6", "1.5")}

    def probe(path: list[str]) -> str:
        return "" if path[0] == running else "no driver"

    path, found = gpu_lane._choose_tensorrt(["packages"], versions, installed, probe)
    assert path == [*([chosen] if chosen else []), "packages"]
    assert [each["tensorrt"] for each in found] == tried
    assert [each["tensorrt"] for each in found if each["runs"]] == (tried[-1:] if running else [])
    assert found[0]["reason"] == (
        "" if running == "packages" else "no driver" if installed else "not installed"
    )


# A measuring process: its exit status, and whether the first model has results then.
Attempt = tuple[int | None, bool]


@pytest.mark.parametrize(
    ("backend", "attempts", "expected", "code"),
    [
        ("tensorrt", [(0, True)], ["tensorrt"], 0),
        ("tensorrt", [(1, True)], ["tensorrt"], 1),  # something failed, but not everything
        ("tensorrt", [(1, False), (0, True)], ["tensorrt", "inductor --resume"], 0),
        ("tensorrt", [(-11, False), (1, True)], ["tensorrt", "inductor --resume"], 1),
        ("tensorrt", [(-11, True), (1, True)], ["tensorrt", "tensorrt --resume"], 1),
        ("auto", [(0, False)], ["auto"], 0),  # without a GPU there are no results
        ("auto", [(-6, True), (1, True)], ["auto", "auto --resume"], 1),
        ("auto", [(-6, True)] * 4, ["auto", *["auto --resume"] * 3], 1),
        ("tensorrt", [(2, False)], ["tensorrt"], 2),  # wrong usage
        ("tensorrt", [(None, True)], ["tensorrt"], 1),  # it hung
    ],
)
def test_measuring_continues_after_a_crash_and_with_inductor_if_tensorrt_gives_nothing(
    backend: str, attempts: list[Attempt], expected: list[str], code: int, tmp_path: Path
) -> None:
    started: list[str] = []

    def measure(backend: str, more: Sequence[str]) -> int | None:
        code, has_results = attempts[len(started)]
        started.append(" ".join([backend, *more]))
        models = {"a fp16": {"speed": [1] if has_results else []}, "b fp16": {"speed": [1]}}
        (tmp_path / "results.json").write_text(json.dumps({"first_model": "a", "models": models}))
        return code

    assert gpu_lane._measure_until_done(backend, tmp_path / "results.json", measure) == code
    assert started == expected


def test_a_timeout_ends_all_processes_that_a_command_started() -> None:
    reader, writer = os.pipe()
    inner = (
        f"import os, time; os.write({writer}, b'begun'); time.sleep(30); os.write({writer}, b'!')"
    )
    outer = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]"
    command = [sys.executable, "-c", f"{outer}, pass_fds=[{writer}])", inner]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_lane._run(command, dict(os.environ), 3, pass_fds=[writer])
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"begun", "no process is left to write more"


@pytest.mark.parametrize(
    ("code", "out", "err", "reason"),
    [
        (1, "Compiling\nEngineFailure: no plan\n", "a warning\n", "EngineFailure: no plan"),
        (-11, "Compiling\n", "a warning\nSegmentation fault\n", "-11 Segmentation fault"),
        (1, "", "", "the process ended with 1"),
        (0, "Compiling\n", "a warning\n", ""),
    ],
)
def test_a_failed_probe_is_explained_by_its_last_line_of_output(
    code: int, out: str, err: str, reason: str
) -> None:
    found = gpu_lane._failure_reason(subprocess.CompletedProcess([], code, out, err))
    assert found.endswith(reason)
    assert bool(found) == bool(reason)
