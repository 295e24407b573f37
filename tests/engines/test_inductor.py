"""The inductor backend, on a CPU."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
import torch._inductor

from model_repo import cards
from model_repo.architectures.registry import create
from model_repo.export import ServedNetwork, trace
from model_repo.pipeline import BuildError, BuildOptions, build
from server.api.stubs import classify_pb2 as pb
from server.engines import golden_check as golden
from server.engines import inductor
from server.engines.base import CompileOptions, Engine, infer
from server.engines.golden_check import MAX_ROW_DEVIATION, deviation, deviation_scale
from server.errors import DeviceLost, EngineFailure
from server.repository import reader
from server.repository.manifest import EngineRecord
from server.repository.reader import Golden
from tests.support.serving import serve

MAX_BATCH = 5


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lenet5 with an OpenVINO and an inductor engine."""
    root = tmp_path_factory.mktemp("inductor")
    options = BuildOptions(
        repo=root, backend="openvino,inductor", max_batch=MAX_BATCH, weights="random:0"
    )
    build("lenet5", options)
    return root


@pytest.fixture
def folder(published: Path) -> Path:
    return published / "lenet5" / "1"


@pytest.fixture
def record(folder: Path) -> EngineRecord:
    return reader.read_manifest(folder).engines[1]


@pytest.fixture
def expected(folder: Path) -> Golden:
    return reader.open_version(folder).golden


@pytest.fixture
def engine(folder: Path, record: EngineRecord) -> Iterator[Engine]:
    engine = cast(Engine, inductor.load(folder, record, (32, 32, 1), threads=2))
    yield engine
    engine.close()


def test_the_build_compares_the_engine_with_eager_pytorch(record: EngineRecord) -> None:
    assert record.name.startswith("inductor-bf16-")
    assert (record.backend_version, record.hardware) == (inductor.version(), inductor.hardware())
    assert set(record.deviation) == {"1", "3", str(MAX_BATCH)}
    assert 0 < max(record.deviation.values()) <= golden.MAX_DEVIATION["bf16"]
    assert inductor.incompatibility(record) is None


def test_the_package_contains_the_weights(folder: Path, record: EngineRecord) -> None:
    package = torch._inductor.aoti_load_package(folder / record.files[0].name)
    assert any(name.startswith("_frozen") for name in package.get_constant_fqns())
    assert not torch.backends.cudnn.allow_tf32, "float32 must not become TF32"


def test_a_row_gets_the_same_answer_at_every_batch_size(engine: Engine, expected: Golden) -> None:
    (instance,) = engine.instances
    scale = deviation_scale(expected.probabilities)
    for rows in range(1, MAX_BATCH + 1):
        classes, scores, probabilities = infer(instance, expected.pixels[:rows])
        assert [a.dtype.name for a in (classes, scores)] == ["int32", "float32"]
        assert classes.shape == scores.shape == (rows, 10)
        alone = infer(instance, expected.pixels[rows - 1 : rows]).probabilities
        found = deviation(alone, probabilities[rows - 1 :], scale[rows - 1 : rows])
        assert found <= MAX_ROW_DEVIATION["bf16"]
        assert engine.computed_rows(rows) == rows


def test_outputs_can_be_kept_and_closing_twice_is_safe(
    folder: Path, record: EngineRecord, expected: Golden
) -> None:
    engine = inductor.load(folder, record, (32, 32, 1), threads=2)
    first = infer(engine.instances[0], expected.pixels[:2])
    kept = first.probabilities.copy()
    infer(engine.instances[0], expected.pixels[2:4])
    assert np.array_equal(first.probabilities, kept)
    instance = weakref.ref(engine.instances[0])
    engine.close()
    engine.close()
    gc.collect()
    assert instance() is None


async def test_a_server_uses_inductor_only_if_requested(published: Path, expected: Golden) -> None:
    image = pb.RawImage(height=32, width=32, channels=1, data=expected.pixels[0].tobytes())
    request = pb.ClassifyRequest(model="lenet5", images=[pb.Image(raw=image)])
    for backend in ("inductor", ""):
        async with serve(published, backend=backend) as served:
            answer = await served.classify(request)
            (model,) = (await served.call("ListModels", pb.ListModelsRequest())).models
        assert answer.results[0].classes[0].index == expected.probabilities[0].argmax()
        assert model.backend == (backend or "openvino"), "OpenVINO is the default on a CPU"
        assert not model.reason


def test_each_incompatibility_names_both_sides(record: EngineRecord) -> None:
    def reason(**fields: str) -> str:
        return inductor.incompatibility(msgspec.structs.replace(record, **fields)) or ""

    assert reason(backend_version="1.0").startswith("it was compiled by torch 1.0, but")
    assert reason(hardware="cuda sm90").startswith(
        "it was compiled for cuda sm90, but this machine has cpu"
    )
    assert "'int4' is unknown" in reason(precision="int4")


def test_loading_a_damaged_package_fails_and_names_the_file(
    record: EngineRecord, tmp_path: Path
) -> None:
    name = record.files[0].name
    for content in (b"", b"\x00" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineFailure, match=name):
            inductor.load(tmp_path, record, (32, 32, 1), threads=1)


# --- GPU code that a CPU can test -------------------------------------------------------------


@pytest.fixture
def for_gpu(record: EngineRecord) -> EngineRecord:
    return msgspec.structs.replace(record, hardware="cuda sm90")


class FakeGpuInstance(inductor.CpuInstance):
    """A GpuInstance that computes on the CPU. Like CUDA graphs, it does not keep the network alive.

    Instances are counted in `created`. Those whose number is in `fail` get no memory.
    """

    created = 0
    fail: frozenset[int] = frozenset()

    def __init__(self, network: Any, size: tuple[int, ...], sizes: Sequence[int]) -> None:
        type(self).created += 1
        if self.created in self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        super().__init__(weakref.proxy(network), torch.zeros(size, dtype=torch.uint8), 1)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeGpuInstance]:
    monkeypatch.setattr(FakeGpuInstance, "created", 0)
    monkeypatch.setattr(inductor, "GpuInstance", FakeGpuInstance)
    return FakeGpuInstance


@pytest.mark.usefixtures("fake_gpu")
def test_only_gpu_networks_are_loaded_single_threaded(
    folder: Path, record: EngineRecord, for_gpu: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[dict[str, Any]] = []
    load = torch._inductor.aoti_load_package

    def loading(path: str, **options: Any) -> Any:
        requested.append(options)
        return load(path, **options)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", loading)
    for each in (record, for_gpu):
        inductor.load(folder, each, (32, 32, 1), threads=1).close()
    assert requested == [{"run_single_threaded": False}, {"run_single_threaded": True}]


@pytest.mark.usefixtures("fake_gpu")
def test_the_weights_live_as_long_as_the_engine(
    folder: Path, for_gpu: EngineRecord, expected: Golden
) -> None:
    engine = inductor.load(folder, for_gpu, (32, 32, 1), threads=1)
    gc.collect()
    assert len(engine.instances) == inductor.GPU_INSTANCES
    for instance in engine.instances:
        golden.compare(infer(instance, expected.pixels[:MAX_BATCH]), _first(expected), "bf16")
    network = weakref.ref(engine._network)
    engine.close()
    gc.collect()
    assert network() is None


def _first(expected: Golden) -> Golden:
    return Golden(expected.pixels[:MAX_BATCH], expected.probabilities[:MAX_BATCH])


def test_a_load_that_fails_at_the_second_instance_stops_all_threads(
    folder: Path,
    for_gpu: EngineRecord,
    fake_gpu: type[FakeGpuInstance],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(fake_gpu, "fail", frozenset(range(2, 20, 2)))
    for _ in range(5):
        with pytest.raises(EngineFailure, match=r"\.pt2: CUDA out of memory\.$") as caught:
            inductor.load(folder, for_gpu, (32, 32, 1), threads=1)
        assert not isinstance(caught.value, DeviceLost)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("opt_batch", "rows"), [(0, 2), (1, 2), (64, 64)])
def test_it_compiles_with_the_batch_size_to_optimise_for(
    opt_batch: int, rows: int, tmp_path: Path
) -> None:
    requested: list[tuple[str, str, int]] = []

    def program(*given: Any) -> Any:
        requested.append(given)
        raise ValueError("no network")

    options = CompileOptions("bf16", 128, opt_batch=opt_batch, program=program)
    with pytest.raises(EngineFailure, match="can't compile x.onnx: no network"):
        inductor.compile(tmp_path / "x.onnx", tmp_path, options)
    assert requested == [("bf16", inductor.hardware().split()[0], rows)]


def test_it_can_not_be_added_to_a_published_version(published: Path) -> None:
    with pytest.raises(BuildError, match="build a new version, without --add-engine"):
        build("lenet5", BuildOptions(repo=published, backend="inductor", add_engine=True))


# --- the faster of two packages --------------------------------------------------------------


def program_of(name: str) -> torch.export.ExportedProgram:
    card = cards.load(name)
    network = create(card.architecture, card.classes).eval()
    served = ServedNetwork(network, top_k=card.top_k, mean=card.mean, std=card.std)
    return trace(served, card.input.shape, 8, "fp32", "cpu")


@pytest.mark.parametrize(
    ("name", "has"), [("lenet5", False), ("resnet18", False), ("resnet50", True)]
)
def test_only_1x1_convolutions_of_stride_1_count(name: str, has: bool) -> None:
    """ResNet-18 has 1x1 convolutions of stride 2, in its shortcuts."""
    assert inductor._has_pointwise_convolutions(program_of(name)) == has


@pytest.mark.parametrize(
    ("seconds", "difference", "fails", "kept"),
    [
        (0.5, 0.001, "", "fused"),
        (1.5, 0.001, "", "plain"),
        (0.5, 0.1, "", "plain"),
        (0.5, 0.001, "_package", "plain"),
        (0.5, 0.001, "_run_timed", "plain"),
    ],
)
def test_the_faster_package_is_kept_if_it_is_correct(
    seconds: float,
    difference: float,
    fails: str,
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses made-up times, because only a GPU has these kernels."""
    path = tmp_path / "x.pt2"
    path.write_text("plain")
    program = program_of("resnet50")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)

    def package(program: Any, path: Path, options: dict[str, Any]) -> None:
        assert options == inductor.FUSED
        if fails == "_package":
            raise RuntimeError("no such kernel")
        path.write_text("fused")

    def run_timed(path: Path, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
        if fails == "_run_timed":
            raise RuntimeError("an illegal address")
        fused = path.read_text() == "fused"
        return (seconds, torch.full((2, 3), difference)) if fused else (1.0, torch.zeros(2, 3))

    monkeypatch.setattr(inductor, "_package", package)
    monkeypatch.setattr(inductor, "_run_timed", run_timed)
    inductor._keep_faster(lambda: program, path)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_all_compiler_options_exist() -> None:
    from torch._inductor import config

    assert inductor.FUSED.keys() <= config.get_config_copy().keys()
