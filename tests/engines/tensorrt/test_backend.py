"""Compiling plans, and the checks of whether this machine can run a plan. No GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from model_repo import cards
from model_repo.architectures.registry import architecture_names
from model_repo.pipeline import BuildOptions, build
from server.engines.base import CompileOptions
from server.engines.tensorrt import backend
from server.engines.tensorrt.cuda import Cuda, Gpu, GpuUnavailable
from server.errors import EngineFailure
from server.repository import reader
from server.repository.manifest import ONNX_FILE, EngineRecord, Manifest
from tests.support.exported_graph import exported_graph
from tests.support.fakes.fake_tensorrt import (
    SHAPE,
)

ADA = Gpu(name="Ada", capability="sm89", driver_cuda=13000, required_cuda=13000, free_bytes=8 << 30)


@pytest.mark.parametrize("name", architecture_names())
def test_every_network_compiles_to_a_plan_without_a_gpu(
    name: str, built_repository: Path, tmp_path: Path
) -> None:
    onnx = exported_graph(name, tmp_path, built_repository)
    steps: list[tuple[int, int | None]] = []
    options = CompileOptions("fp16", max_batch=64, opt_batch=8)
    compiled = backend.compile(onnx, tmp_path, options, lambda *step: steps.append(step))
    assert compiled.name == f"tensorrt-fp16-sm80-121-rtx{backend.version().split()[1]}"
    assert compiled.hardware == "sm80 sm86 sm89 sm120 sm121"
    assert compiled.version == backend.version()
    (file,) = compiled.files
    graph_bytes = onnx.stat().st_size
    assert (tmp_path / file).stat().st_size > 0.4 * graph_bytes, "weights are stored as float16"
    assert steps
    assert all(0 < done <= (total or 0) for done, total in steps)


def test_the_name_contains_precision_and_compute_capabilities(
    built_repository: Path, tmp_path: Path
) -> None:
    onnx = built_repository / "lenet5" / "1" / ONNX_FILE
    release = f"rtx{backend.version().split()[1]}"
    for requested, precision, name, hardware in (
        (("8.9",), "bf16", f"tensorrt-bf16-sm89-{release}", "sm89"),
        (("sm120", "89"), "fp32", f"tensorrt-fp32-sm89-120-{release}", "sm89 sm120"),
        (("75", "120"), "fp16", f"tensorrt-fp16-sm75-120-{release}", "sm75 sm120"),
    ):
        compiled = backend.compile(
            onnx, tmp_path, CompileOptions(precision, 4, hardware=requested, variant="rtx")
        )
        assert (compiled.name, compiled.hardware) == (name, hardware)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            CompileOptions("fp16", 4, hardware=("90",)),
            r"does not support compute capability sm90; it supports sm75, sm80",
        ),
        (
            CompileOptions("fp16", 4, variant="tensorrt"),
            r"TensorRT is not installed: pip install 'convserve\[gpu-datacenter\]'",
        ),
    ],
)
def test_an_impossible_compilation_is_rejected_with_the_reason(
    options: CompileOptions, reason: str, built_repository: Path, tmp_path: Path
) -> None:
    onnx = built_repository / "lenet5" / "1" / ONNX_FILE
    with pytest.raises(EngineFailure, match=reason):
        backend.compile(onnx, tmp_path, options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, built_repository: Path) -> Path:
    """A repository in which lenet5 has an OpenVINO engine and a TensorRT engine."""
    root = tmp_path_factory.mktemp("repository")
    options = BuildOptions(repo=root, backend="openvino,tensorrt", weights="random:0")
    build("lenet5", options)
    return root


@pytest.fixture
def record(repository: Path) -> EngineRecord:
    return manifest_of(repository).engines[1]


def manifest_of(root: Path, version: int = 1) -> Manifest:
    return reader.read_manifest(root / "lenet5" / str(version))


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """From now on, this machine appears to have that GPU."""

    class FakeCuda:
        def gpu(self) -> Gpu:
            return gpu

    monkeypatch.setattr(backend, "Cuda", FakeCuda)


def test_the_manifest_records_a_plan_beside_the_cpu_engine(repository: Path) -> None:
    cpu, gpu = manifest_of(repository).engines
    assert (cpu.backend, gpu.backend, gpu.precision) == ("openvino", "tensorrt", "fp16")
    assert gpu.backend_version == backend.version()
    card = cards.load("lenet5")
    assert (gpu.min_batch, gpu.opt_batch, gpu.max_batch) == (
        1,
        card.gpu_opt_batch,
        card.gpu_max_batch,
    )
    assert cpu.deviation
    assert not gpu.deviation, "the plan was not run"
    reader.verify_files(repository / "lenet5" / "1", manifest_of(repository))


def test_a_plan_is_compatible_with_the_gpu_it_was_compiled_for(
    record: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ADA)
    assert backend.incompatibility(record) is None


def test_each_incompatibility_names_what_is_wrong_and_what_to_do(
    record: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(gpu: Gpu = ADA, **fields: Any) -> str:
        pretend(monkeypatch, gpu)
        return backend.incompatibility(msgspec.structs.replace(record, **fields)) or ""

    release = backend.version().split()[1]
    advice = "--add-engine --backend tensorrt"
    old = reason(backend_version="rtx 1.2.0")
    assert old.startswith(f"it was compiled by TensorRT-RTX 1.2.0, but {release} is installed; ")
    assert old.endswith(advice)
    other = reason(backend_version="tensorrt 11.4.0")
    assert other.startswith("it needs TensorRT 11.4.0, which is not installed; install it, or ")
    unknown = reason(backend_version="abacus 1")
    assert unknown.startswith("it was compiled by 'abacus 1', which this server does not support; ")
    hopper = reason(ADA._replace(name="H200", capability="sm90"))
    assert "for sm80, sm86, sm89, sm120, sm121, but this GPU, H200, is sm90" in hopper
    assert hopper.endswith(advice)
    driver = reason(ADA._replace(driver_cuda=12040))
    assert driver.startswith(
        "the NVIDIA driver supports CUDA 12.4, but the installed libraries need 13.0"
    )
    full = reason(ADA._replace(free_bytes=100 << 20))
    assert "512 MiB of GPU memory, but 100 MiB are free" in full
    assert "precision 'int4' is unknown" in reason(precision="int4")


def test_a_library_whose_shared_libraries_are_missing_counts_as_not_installed(
    record: EngineRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's package raises this error in that case."""
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('no libnvinfer.so.11')\n")
    monkeypatch.syspath_prepend(tmp_path)
    pretend(monkeypatch, ADA)
    plan = msgspec.structs.replace(record, backend_version="tensorrt 11.4.0")
    assert "not installed" in (backend.incompatibility(plan) or "")
    assert backend.version().startswith("rtx "), "the other variant is used"


def test_without_a_gpu_the_reason_is_the_missing_driver(
    repository: Path, record: EngineRecord
) -> None:
    try:
        Cuda()
    except GpuUnavailable:
        assert "no NVIDIA driver" in (backend.incompatibility(record) or "")
        assert backend.hardware() == "none"
        with pytest.raises(EngineFailure, match=r"can't load .*\.plan: this machine has no"):
            backend.load(repository / "lenet5" / "1", record, SHAPE, threads=1)
    else:
        pytest.skip("this machine has a GPU")
