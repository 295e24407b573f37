"""The measuring process: resuming after a crash, machines without a GPU, damaged plans."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from model_repo.pipeline import BuildOptions, build
from server.engines.tensorrt import backend as tensorrt
from server.engines.tensorrt.cuda import CudaError
from server.repository.contents import list_versions
from tests.gpu import measure
from tests.gpu.measuring import checks, machine
from tests.gpu.measuring.measurement_run import MeasurementRun
from tests.gpu.measuring.speed import multiplications_of
from tests.gpu.options import lane_parser
from tests.support.fakes.cuda_recorder import CudaRecorder

ROOT = Path(__file__).resolve().parent.parent.parent


def new_run(out: Path, *, resume: bool = False) -> MeasurementRun:
    options = vars(lane_parser("lane", None).parse_args(["--out", str(out)]))
    options |= {"scratch": out, "tried": "[]", "command": "lane", "resume": resume}
    return MeasurementRun(Namespace(**options))


def test_the_next_process_continues_after_the_step_that_crashed(tmp_path: Path) -> None:
    done: list[str] = []
    first = new_run(tmp_path)
    first.result_step("copies", "copies", lambda: {"to_device": 1.0, "to_host": 1.0})
    with pytest.raises(KeyboardInterrupt):  # leaves the same file as a crash
        first.step("fatal", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    second = new_run(tmp_path, resume=True)
    second.result_step("copies", "copies", lambda: done.append("copies"))
    second.step("fatal", lambda: done.append("fatal"))
    second.step("next", lambda: done.append("next"))
    second.save()
    assert done == ["next"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["copies"] == {"to_device": 1.0, "to_host": 1.0}
    assert found["failed"] == [{"step": "fatal", "reason": "the process ended during this step"}]
    assert "running" not in found


def test_a_step_that_exits_is_recorded_and_the_next_step_runs(tmp_path: Path) -> None:
    run = new_run(tmp_path)

    def exits() -> None:
        raise SystemExit("bench: the server did not start")

    assert run.step("first", exits) is None
    assert run.step("second", lambda: 2) == 2
    failed = json.loads((tmp_path / "results.json").read_text())["failed"]
    assert failed == [{"step": "first", "reason": "SystemExit: bench: the server did not start"}]


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="this machine has a GPU")
def test_without_a_gpu_and_without_tensorrt_nothing_runs_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise ImportError("no TensorRT")

    monkeypatch.setattr(tensorrt, "version", missing)
    assert measure.main(["--out", str(tmp_path), "--models", "lenet5"]) == 0
    output = capsys.readouterr().out
    assert "TensorRT can't compile either: no TensorRT" in output
    assert "failed" not in output


def test_a_machine_on_which_cuda_fails_counts_as_one_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise CudaError("cudaErrorSystemNotReady", "cudaGetDeviceCount")

    monkeypatch.setattr(machine, "Cuda", fails)
    about = machine.describe_machine()
    assert about["gpu"] is None
    assert about["why_no_gpu"] == "cudaGetDeviceCount: cudaErrorSystemNotReady"


def test_measuring_engines_needs_no_serving_packages() -> None:
    missing = ("grpc", "starlette", "uvicorn", "uvloop", "watchfiles", "sklearn", "skimage")
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); import tests.gpu.measure"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(tensorrt.hardware() != "none", reason="a GPU may accept a plan with a hole")
def test_damaged_plans_are_loaded_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the real runtime of TensorRT-RTX, which rejects every plan without a driver."""
    build("lenet5", BuildOptions(repo=tmp_path / "engines", backend="tensorrt", weights="random:0"))
    (version,) = list_versions(tmp_path / "engines")
    cuda = CudaRecorder()
    monkeypatch.setattr(tensorrt, "Cuda", lambda: cuda)
    monkeypatch.setattr(checks, "Cuda", lambda: cuda)
    monkeypatch.setattr(checks, "DAMAGED_LOADS", 10)
    found = checks.load_damaged_plans(tmp_path / "damaged", version)
    assert found == {"loads": 10, "rejected": 10, "lost_bytes": 0}
    assert len(list((tmp_path / "damaged").glob("*/*.plan"))) == 2
    assert not cuda.live


def test_the_beginning_of_a_damaged_plan_is_intact() -> None:
    plan = bytes(range(1, 100))
    for content in checks.damaged_copies(plan).values():
        assert content != plan
        assert content[:30] == plan[:30]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet50", 4.089), ("vgg16", 15.47), ("googlenet", 1.498), ("alexnet", 0.714)],
)
def test_multiplications_match_the_published_numbers(name: str, billions: float) -> None:
    """https://pytorch.org/vision/stable/models.html, where GFLOPS counts multiply-accumulates."""
    assert multiplications_of(name) / 1e9 == pytest.approx(billions, rel=2e-3)
