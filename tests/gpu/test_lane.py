"""The GPU's lane is one command: without a GPU it compiles, and what measures is run on null."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model_repo.pipeline import BuildOptions, build
from server.engines.tensorrt import backend as tensorrt
from server.engines.tensorrt.cuda import CudaError
from server.repository.contents import list_versions
from tests.gpu import lane as gpu_lane
from tests.gpu import measure as gpu_measure
from tests.gpu.measure import multiplications_of
from tests.support.cuda_recorder import CudaRecorder

ROOT = Path(__file__).resolve().parent.parent.parent


def lane(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The results and their table."""
    command = [sys.executable, "-m", "tests.gpu.lane", "--out", str(out), "--models", "lenet5"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md"}
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
    assert results["command"] == "python -m tests.gpu.lane --out DIR --models lenet5"


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
    ours = f"cp3{sys.version_info.minor}"
    names = ["numpy-1.0-py3-none-any", "grpcio-999.0-py3-none-any", "absent_thing-1.0-py3-none-any"]
    names += [f"stable_thing-1.0-cp39-abi3-manylinux_2_28_{platform.machine()}"]
    names += [f"compiled_thing-1.0-{ours}-{ours}-linux_{platform.machine()}"]
    names += ["other_python-1.0-cp32-cp32-any", f"other_machine-1.0-{ours}-{ours}-linux_abacus"]
    names += [
        f"tensorrt_rtx_cu13_libs-{version}-py2.py3-none-any"
        for version in ("9.9", *sorted(gpu_lane.RTX))
    ]
    for name in names:
        with zipfile.ZipFile(wheels / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}/__init__.py", "")
    packages = tmp_path / "out" / "packages"
    versions = gpu_lane._unpack(wheels, packages)
    assert list(versions) == [*gpu_lane.RTX, "9.9"]
    assert {path.name for path in packages.iterdir()} == {
        *("absent_thing", "compiled_thing", "stable_thing"),
        "grpcio",  # which is older here; numpy is newer
    }
    assert all((folder / "tensorrt_rtx_cu13_libs").is_dir() for folder in versions.values())


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
def test_the_first_tensorrt_that_runs_is_found_or_else_the_first_that_there_is(
    running: str, installed: bool, chosen: str | None, tried: list[str]
) -> None:
    versions = {name: Path(name) for name in ("1.6", "1.5")}

    def probe(path: list[str]) -> str:
        return "" if path[0] == running else "no driver"

    path, told = gpu_lane._choose(["packages"], versions, installed, probe)
    assert path == [*([chosen] if chosen else []), "packages"]
    assert [each["tensorrt"] for each in told] == tried
    assert [each["tensorrt"] for each in told if each["runs"]] == (tried[-1:] if running else [])
    assert told[0]["why"] == (
        "" if running == "packages" else "no driver" if installed else "there is none"
    )


# A measuring process: how it ends, and whether there are figures of the first model then.
Attempt = tuple[int | None, bool]


@pytest.mark.parametrize(
    ("backend", "attempts", "asked", "code"),
    [
        ("tensorrt", [(0, True)], ["tensorrt"], 0),
        ("tensorrt", [(1, True)], ["tensorrt"], 1),  # something failed, but not all
        ("tensorrt", [(1, False), (0, True)], ["tensorrt", "inductor --resume"], 0),
        ("tensorrt", [(-11, False), (1, True)], ["tensorrt", "inductor --resume"], 1),
        ("tensorrt", [(-11, True), (1, True)], ["tensorrt", "tensorrt --resume"], 1),
        ("auto", [(0, False)], ["auto"], 0),  # without a GPU there are no figures
        ("auto", [(-6, True), (1, True)], ["auto", "auto --resume"], 1),
        ("auto", [(-6, True)] * 4, ["auto", *["auto --resume"] * 3], 1),
        ("tensorrt", [(2, False)], ["tensorrt"], 2),  # wrong usage
        ("tensorrt", [(None, True)], ["tensorrt"], 1),  # it hung
    ],
)
def test_measuring_goes_on_behind_a_crash_and_without_tensorrt_where_that_gives_nothing(
    backend: str, attempts: list[Attempt], asked: list[str], code: int, tmp_path: Path
) -> None:
    told: list[str] = []

    def measure(backend: str, more: Sequence[str]) -> int | None:
        ended, has_figures = attempts[len(told)]
        told.append(" ".join([backend, *more]))
        models = {"a fp16": {"speed": [1] if has_figures else []}, "b fp16": {"speed": [1]}}
        (tmp_path / "results.json").write_text(json.dumps({"first": "a", "models": models}))
        return ended

    assert gpu_lane._through(backend, tmp_path / "results.json", measure) == code
    assert told == asked


def test_the_next_process_goes_on_behind_the_step_in_which_one_crashed(tmp_path: Path) -> None:
    def lane(*options: str) -> gpu_measure.Lane:
        parser = gpu_lane.parser_of("lane", None)
        parser.add_argument("--resume", action="store_true")
        given = parser.parse_args(["--out", str(tmp_path), *options])
        return gpu_measure.Lane(
            Namespace(**vars(given) | {"scratch": tmp_path, "tried": "[]", "command": "lane"})
        )

    done: list[str] = []
    first = lane()
    gpu_measure.whole(first, "copies", "copies", lambda: {"to_device": 1.0, "to_host": 1.0})
    with pytest.raises(KeyboardInterrupt):  # as far as the file goes, a crash
        first.step("fatal", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    second = lane("--resume")
    gpu_measure.whole(second, "copies", "copies", lambda: done.append("copies"))
    second.step("fatal", lambda: done.append("fatal"))
    second.step("next", lambda: done.append("next"))
    second.save()
    assert done == ["next"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["copies"] == {"to_device": 1.0, "to_host": 1.0}
    assert found["failed"] == [{"step": "fatal", "why": "the process ended in it"}]
    assert "running" not in found


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="this machine has a GPU")
def test_without_a_gpu_and_without_tensorrt_nothing_is_run_and_nothing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise ImportError("no TensorRT")

    monkeypatch.setattr(tensorrt, "version", missing)
    assert gpu_measure.main(["--out", str(tmp_path), "--models", "lenet5"]) == 0
    told = capsys.readouterr().out
    assert "and nothing to compile with: no TensorRT" in told
    assert "failed" not in told


def test_a_step_that_ends_the_process_is_written_down_and_the_next_is_taken(tmp_path: Path) -> None:
    given = gpu_lane.parser_of("lane", None).parse_args(["--out", str(tmp_path)])
    lane = gpu_measure.Lane(
        Namespace(
            **vars(given) | {"scratch": tmp_path, "tried": "[]", "command": "lane", "resume": False}
        )
    )

    def ends() -> None:
        raise SystemExit("bench: the server did not start")

    assert lane.step("first", ends) is None
    assert lane.step("second", lambda: 2) == 2
    failed = json.loads((tmp_path / "results.json").read_text())["failed"]
    assert failed == [{"step": "first", "why": "SystemExit: bench: the server did not start"}]


def test_what_the_lane_starts_ends_with_it() -> None:
    told, tells = os.pipe()
    inner = f"import os, time; os.write({tells}, b'begun'); time.sleep(30); os.write({tells}, b'!')"
    outer = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]"
    command = [sys.executable, "-c", f"{outer}, pass_fds=[{tells}])", inner]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_lane._run(command, dict(os.environ), 3, pass_fds=[tells])
    os.close(tells)
    with open(told, "rb") as pipe:
        assert pipe.read() == b"begun", "nobody is left to write more"


@pytest.mark.parametrize(
    ("code", "out", "err", "why"),
    [
        (1, "Compiling\nEngineFailure: no plan\n", "a warning\n", "EngineFailure: no plan"),
        (-11, "Compiling\n", "a warning\nSegmentation fault\n", "-11 Segmentation fault"),
        (1, "", "", "the process ended with 1"),
        (0, "Compiling\n", "a warning\n", ""),
    ],
)
def test_the_reason_of_a_probe_is_what_it_says_itself(
    code: int, out: str, err: str, why: str
) -> None:
    found = gpu_lane._reason(subprocess.CompletedProcess([], code, out, err))
    assert found.endswith(why)
    assert bool(found) == bool(why)


def test_a_machine_whose_cuda_fails_is_one_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise CudaError("cudaErrorSystemNotReady", "cudaGetDeviceCount")

    monkeypatch.setattr(gpu_measure, "Cuda", fails)
    about = gpu_measure.machine()
    assert about["gpu"] is None
    assert about["why_no_gpu"] == "cudaGetDeviceCount: cudaErrorSystemNotReady"


def test_engines_are_measured_without_what_only_serving_needs() -> None:
    missing = ("grpc", "starlette", "uvicorn", "uvloop", "watchfiles", "sklearn", "skimage")
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import tests.gpu.measure"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="a GPU may take a plan with a hole")
def test_damaged_plans_are_loaded_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TensorRT-RTX's own runtime, which refuses them all where there is no driver."""
    build("lenet5", BuildOptions(repo=tmp_path / "engines", backend="tensorrt", weights="random:0"))
    (version,) = list_versions(tmp_path / "engines")
    tape = CudaRecorder()
    monkeypatch.setattr(tensorrt, "Cuda", lambda: tape)
    monkeypatch.setattr(gpu_measure, "Cuda", lambda: tape)
    monkeypatch.setattr(gpu_measure, "BAD_LOADS", 10)
    found = gpu_measure.load_damaged(tmp_path / "damaged", version)
    assert found == {"loads": 10, "refused": 10, "lost_bytes": 0}
    assert len(list((tmp_path / "damaged").glob("*/*.plan"))) == 2
    assert not tape.live


def test_a_damaged_plan_keeps_what_is_looked_at_first() -> None:
    plan = bytes(range(1, 100))
    for content in gpu_measure.damaged(plan).values():
        assert content != plan
        assert content[:30] == plan[:30]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet50", 4.089), ("vgg16", 15.47), ("googlenet", 1.498), ("alexnet", 0.714)],
)
def test_multiplications_are_those_published_for_the_public_weights(
    name: str, billions: float
) -> None:
    """https://pytorch.org/vision/stable/models.html, GFLOPS there being multiply-accumulates."""
    assert multiplications_of(name) / 1e9 == pytest.approx(billions, rel=2e-3)
