"""Promises of PyTorch's ahead-of-time compiler as an engine: an independent check of OpenVINO."""

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

from model_repo import architectures, cards
from model_repo.build import BuildError, Order, build
from model_repo.export import Served, traced
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
    """lenet5 with an engine of each kind, both held against eager PyTorch."""
    root = tmp_path_factory.mktemp("inductor")
    order = Order(repo=root, backend="openvino,inductor", max_batch=MAX_BATCH, weights="random:0")
    build("lenet5", order)
    return root


@pytest.fixture
def folder(published: Path) -> Path:
    return published / "lenet5" / "1"


@pytest.fixture
def record(folder: Path) -> EngineRecord:
    return reader.read_manifest(folder).engines[1]


@pytest.fixture
def truth(folder: Path) -> Golden:
    return reader.open_version(folder).golden


@pytest.fixture
def engine(folder: Path, record: EngineRecord) -> Iterator[Engine]:
    engine = cast(Engine, inductor.load(folder, record, (32, 32, 1), threads=2))
    yield engine
    engine.close()


def test_it_gave_the_answers_of_eager_pytorch(record: EngineRecord) -> None:
    assert record.name.startswith("inductor-bf16-")
    assert (record.backend_version, record.hardware) == (inductor.version(), inductor.hardware())
    assert set(record.deviation) == {"1", "3", str(MAX_BATCH)}
    assert 0 < max(record.deviation.values()) <= golden.MAX_DEVIATION["bf16"]
    assert inductor.incompatibility(record) is None


def test_weights_are_part_of_what_is_compiled(folder: Path, record: EngineRecord) -> None:
    package = torch._inductor.aoti_load_package(folder / record.files[0].name)
    assert any(name.startswith("_frozen") for name in package.get_constant_fqns())
    assert not torch.backends.cudnn.allow_tf32, "float32 means float32"


def test_every_number_of_rows_is_answered_alike(engine: Engine, truth: Golden) -> None:
    (instance,) = engine.instances
    scale = deviation_scale(truth.probabilities)
    for rows in range(1, MAX_BATCH + 1):
        classes, scores, probabilities = infer(instance, truth.pixels[:rows])
        assert [a.dtype.name for a in (classes, scores)] == ["int32", "float32"]
        assert classes.shape == scores.shape == (rows, 10)
        alone = infer(instance, truth.pixels[rows - 1 : rows]).probabilities
        far = deviation(alone, probabilities[rows - 1 :], scale[rows - 1 : rows])
        assert far <= MAX_ROW_DEVIATION["bf16"]
        assert engine.computed_rows(rows) == rows


def test_answers_are_kept_and_closing_twice_is_safe(
    folder: Path, record: EngineRecord, truth: Golden
) -> None:
    engine = inductor.load(folder, record, (32, 32, 1), threads=2)
    first = infer(engine.instances[0], truth.pixels[:2])
    kept = first.probabilities.copy()
    infer(engine.instances[0], truth.pixels[2:4])
    assert np.array_equal(first.probabilities, kept)
    instance = weakref.ref(engine.instances[0])
    engine.close()
    engine.close()
    gc.collect()
    assert instance() is None


async def test_it_serves_where_it_is_asked_for(published: Path, truth: Golden) -> None:
    image = pb.RawImage(height=32, width=32, channels=1, data=truth.pixels[0].tobytes())
    request = pb.ClassifyRequest(model="lenet5", images=[pb.Image(raw=image)])
    for backend in ("inductor", ""):
        async with serve(published, backend=backend) as served:
            answer = await served.classify(request)
            (model,) = (await served.call("ListModels", pb.ListModelsRequest())).models
        assert answer.results[0].classes[0].index == truth.probabilities[0].argmax()
        assert model.backend == (backend or "openvino"), "OpenVINO comes first on a CPU"
        assert not model.reason


def test_every_mismatch_is_a_plain_sentence(record: EngineRecord) -> None:
    def why(**fields: str) -> str:
        return inductor.incompatibility(msgspec.structs.replace(record, **fields)) or ""

    assert why(backend_version="1.0").startswith("it was compiled by torch 1.0 and this is")
    assert why(hardware="cuda sm90").startswith("it was compiled for cuda sm90 and this is cpu")
    assert "'int4' is unknown" in why(precision="int4")


def test_a_damaged_package_is_a_failure_that_names_the_file(
    record: EngineRecord, tmp_path: Path
) -> None:
    name = record.files[0].name
    for content in (b"", b"\x00" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EngineFailure, match=name):
            inductor.load(tmp_path, record, (32, 32, 1), threads=1)


# --- for a GPU, as far as a CPU can tell ------------------------------------------------------


@pytest.fixture
def for_gpu(record: EngineRecord) -> EngineRecord:
    return msgspec.structs.replace(record, hardware="cuda sm90")


class StandIn(inductor.CpuInstance):
    """Computes on the CPU in the place of an instance on a GPU, whose graphs are no owners of the
    network either. Every number in `fail` is one that there is no memory for."""

    made = 0
    fail: frozenset[int] = frozenset()

    def __init__(self, network: Any, size: tuple[int, ...], sizes: Sequence[int]) -> None:
        type(self).made += 1
        if self.made in self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        super().__init__(weakref.proxy(network), torch.zeros(size, dtype=torch.uint8), 1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "made", 0)
    monkeypatch.setattr(inductor, "GpuInstance", StandIn)
    return StandIn


@pytest.mark.usefixtures("stand_in")
def test_only_a_network_for_a_gpu_is_loaded_without_what_no_capture_allows(
    folder: Path, record: EngineRecord, for_gpu: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    load = torch._inductor.aoti_load_package

    def loading(path: str, **options: Any) -> Any:
        asked.append(options)
        return load(path, **options)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", loading)
    for each in (record, for_gpu):
        inductor.load(folder, each, (32, 32, 1), threads=1).close()
    assert asked == [{"run_single_threaded": False}, {"run_single_threaded": True}]


@pytest.mark.usefixtures("stand_in")
def test_the_weights_live_as_long_as_the_engine(
    folder: Path, for_gpu: EngineRecord, truth: Golden
) -> None:
    engine = inductor.load(folder, for_gpu, (32, 32, 1), threads=1)
    gc.collect()
    assert len(engine.instances) == inductor.INSTANCES
    for instance in engine.instances:
        golden.compare(infer(instance, truth.pixels[:MAX_BATCH]), _first(truth), "bf16")
    network = weakref.ref(engine._network)
    engine.close()
    gc.collect()
    assert network() is None


def _first(truth: Golden) -> Golden:
    return Golden(truth.pixels[:MAX_BATCH], truth.probabilities[:MAX_BATCH])


def test_a_load_that_fails_at_its_second_instance_leaves_nothing_behind(
    folder: Path,
    for_gpu: EngineRecord,
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(stand_in, "fail", frozenset(range(2, 20, 2)))
    for _ in range(5):
        with pytest.raises(EngineFailure, match=r"\.pt2: CUDA out of memory\.$") as caught:
            inductor.load(folder, for_gpu, (32, 32, 1), threads=1)
        assert not isinstance(caught.value, DeviceLost)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("opt_batch", "rows"), [(0, 2), (1, 2), (64, 64)])
def test_it_is_compiled_for_the_batch_it_is_tuned_for(
    opt_batch: int, rows: int, tmp_path: Path
) -> None:
    asked: list[tuple[str, str, int]] = []

    def program(*given: Any) -> Any:
        asked.append(given)
        raise ValueError("no network")

    target = CompileOptions("bf16", 128, opt_batch=opt_batch, program=program)
    with pytest.raises(EngineFailure, match="can't compile x.onnx: no network"):
        inductor.compile(tmp_path / "x.onnx", tmp_path, target)
    assert asked == [("bf16", inductor.hardware().split()[0], rows)]


def test_it_can_not_be_added_to_a_version_that_has_no_network_any_more(published: Path) -> None:
    with pytest.raises(BuildError, match="build a new version, without --add-engine"):
        build("lenet5", Order(repo=published, backend="inductor", add=True))


# --- what is faster of two -------------------------------------------------------------------


def program_of(name: str) -> torch.export.ExportedProgram:
    card = cards.load(name)
    network = architectures.create(card.architecture, card.classes).eval()
    served = Served(network, classes=card.classes, mean=card.mean, std=card.std)
    return traced(served, card.input.shape, 8, "fp32", "cpu")


@pytest.mark.parametrize(
    ("name", "has"), [("lenet5", False), ("resnet18", False), ("resnet50", True)]
)
def test_pointwise_convolutions_are_those_of_stride_1(name: str, has: bool) -> None:
    """ResNet-18's have stride 2, on the way round its blocks."""
    assert inductor._has_pointwise_convolutions(program_of(name)) == has


@pytest.mark.parametrize(
    ("seconds", "apart", "fails", "kept"),
    [
        (0.5, 0.001, "", "fused"),
        (1.5, 0.001, "", "plain"),
        (0.5, 0.1, "", "plain"),
        (0.5, 0.001, "_package", "plain"),
        (0.5, 0.001, "_timed", "plain"),
    ],
)
def test_of_two_packages_the_faster_is_kept_where_it_is_right(
    seconds: float,
    apart: float,
    fails: str,
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice, with made-up times: only a GPU has the kernels."""
    path = tmp_path / "x.pt2"
    path.write_text("plain")
    program = program_of("resnet50")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)

    def package(program: Any, path: Path, options: dict[str, Any]) -> None:
        assert options == inductor.FUSED
        if fails == "_package":
            raise RuntimeError("no such kernel")
        path.write_text("fused")

    def timed(path: Path, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
        if fails == "_timed":
            raise RuntimeError("an illegal address")
        fused = path.read_text() == "fused"
        return (seconds, torch.full((2, 3), apart)) if fused else (1.0, torch.zeros(2, 3))

    monkeypatch.setattr(inductor, "_package", package)
    monkeypatch.setattr(inductor, "_timed", timed)
    inductor._take_fused(lambda: program, path)
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_options_of_the_compiler_are_options_that_it_has() -> None:
    from torch._inductor import config

    assert inductor.FUSED.keys() <= config.get_config_copy().keys()
