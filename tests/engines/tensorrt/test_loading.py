"""Loading plans, with fakes of TensorRT and CUDA."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from server.engines.base import infer
from server.engines.tensorrt import backend, libraries
from server.engines.tensorrt.runtime import INSTANCES, TensorRtEngine
from server.errors import DeviceLost, EngineFailure
from server.repository.manifest import FileRecord
from tests.support.fakes.cuda_recorder import CudaRecorder
from tests.support.fakes.fake_tensorrt import (
    CLASSES,
    SHAPE,
    FakeTensorRt,
    FakeTensorRtRtx,
    fake_record,
    images_of,
)


@pytest.fixture
def cuda() -> CudaRecorder:
    return CudaRecorder()


def install(
    kind: type[FakeTensorRt], cuda: CudaRecorder, monkeypatch: pytest.MonkeyPatch
) -> FakeTensorRt:
    """From now on, the backend uses this fake TensorRT and this fake CUDA."""
    fake = kind(cuda, SHAPE, CLASSES)
    monkeypatch.setattr(backend, "Cuda", lambda: cuda)
    monkeypatch.setattr(backend, "import_library", lambda variant: fake)
    return fake


def load(folder: Path, content: bytes = b"a plan") -> TensorRtEngine:
    (folder / "x.plan").write_bytes(content)
    files = (FileRecord(name="x.plan", bytes=len(content), sha256="0" * 64),)
    return backend.load(folder, fake_record(files=files), SHAPE, threads=1)


@pytest.mark.parametrize("kind", [FakeTensorRt, FakeTensorRtRtx])
def test_a_plan_of_either_variant_loads_runs_and_frees_everything(
    kind: type[FakeTensorRt], cuda: CudaRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(kind, cuda, monkeypatch)
    engine = load(tmp_path)
    assert len(library.contexts) == len(engine.instances) == INSTANCES
    for instance in engine.instances:
        assert infer(instance, images_of(1, 2, 3)).classes[:, 0].tolist() == [1, 2, 3]
        assert instance.captured == [1, 2, 4, 6]
    assert cuda.calls.count(("allocate", library.layers_bytes)) == INSTANCES
    engine.close()
    assert not cuda.live


def test_tensorrt_rtx_compiles_once_for_all_instances_and_captures_no_graph_itself(
    cuda: CudaRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(FakeTensorRtRtx, cuda, monkeypatch)
    engine = load(tmp_path)
    gc.collect()
    config, *others = library.configs
    assert all(each is config for each in others)
    assert config.cuda_graph_strategy.name == "DISABLED"
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert config.runtime_cache() is not None, "the cache lives as long as the engine"
    engine.close()
    gc.collect()
    assert config.runtime_cache() is None


@pytest.mark.parametrize("call", ["gpu", "allocate", "copy_to_device", "synchronize"])
def test_a_load_recognises_a_lost_device(
    call: str, cuda: CudaRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(FakeTensorRtRtx, cuda, monkeypatch)
    library.runs = call != "synchronize"  # TensorRT only says that the run failed
    for name, kind in (
        ("cudaErrorIllegalAddress", DeviceLost),
        ("cudaErrorUnknown", EngineFailure),
    ):
        cuda.fail = {call: name}
        with pytest.raises(
            EngineFailure, match=rf"^TensorRT can't load x\.plan: {call}: {name}$"
        ) as caught:
            load(tmp_path)
        assert type(caught.value) is kind
        assert not cuda.live


def test_a_plan_that_does_not_fit_into_memory_says_how_much_it_needs(
    cuda: CudaRecorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install(FakeTensorRt, cuda, monkeypatch)
    library.layers_bytes = 3 << 30
    cuda.free_bytes = 5 << 30
    with pytest.raises(EngineFailure, match="needs 6,144 MiB .* 5,120 MiB are free; .*--max-batch"):
        load(tmp_path)
    assert not cuda.live


def test_a_failed_load_reports_only_its_own_errors(
    cuda: CudaRecorder, tmp_path: Path, built_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the real runtime of TensorRT-RTX, and its logger, which the whole process shares."""
    monkeypatch.setattr(backend, "Cuda", lambda: cuda)
    trt = libraries.import_library("rtx")
    logger = libraries.fresh_logger(trt)
    logger.errors.append("an error from before")
    with pytest.raises(EngineFailure, match=r"can't load x\.plan: ") as caught:
        load(tmp_path, b"damaged")
    assert logger.errors, "TensorRT logged its errors"
    assert "error from before" not in str(caught.value)
    assert "gives no reason" not in str(caught.value)
    assert libraries.fresh_logger(trt) is logger
