"""Promises that every backend keeps."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np
import pytest

from server.engines import base, openvino
from server.engines.base import (
    BACKENDS,
    Backend,
    CompileOptions,
    Engine,
    OnDone,
    Outputs,
    backend,
    infer,
)
from server.engines.golden_check import MAX_ROW_DEVIATION, deviation, deviation_scale
from server.engines.tensorrt import backend as tensorrt_backend
from server.errors import EngineFailure
from server.images.input_spec import Pixels
from server.repository import reader, writer
from server.repository.manifest import ONNX_FILE, EngineRecord, Manifest

MAX_BATCH = 5
CLASSES = 10


class Compiled:
    """LeNet-5 compiled by one backend in its best precision."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        self.backend: Backend = backend(name)
        self.folder = folder
        self.published = root / "lenet5" / "1"
        self.manifest: Manifest = reader.read_manifest(self.published)
        self.onnx = self.published / ONNX_FILE
        precision = self.backend.best_precision()
        made = self.backend.compile(self.onnx, folder, CompileOptions(precision, MAX_BATCH))
        self.record = EngineRecord(
            name=f"{name}-{precision}",
            backend=name,
            backend_version=self.backend.version(),
            precision=precision,
            hardware=self.backend.hardware(),
            max_batch=MAX_BATCH,
            files=tuple(writer.file_record(folder / file) for file in made.files),
            deviation={},
        )

    def load(self, threads: int = 2) -> Engine:
        shape = self.manifest.input.spec().shape
        return self.backend.load(self.folder, self.record, shape, threads=threads)


WITH_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(tensorrt_backend.hardware() == "none", reason="this machine has no GPU"),
]


@pytest.fixture(params=["openvino", "null", pytest.param("tensorrt", marks=WITH_A_GPU)])
def compiled(request: pytest.FixtureRequest, built_repository: Path, tmp_path: Path) -> Compiled:
    return Compiled(request.param, built_repository, tmp_path)


@pytest.fixture
def engine(compiled: Compiled) -> Iterator[Engine]:
    engine = compiled.load()
    yield engine
    engine.close()


@pytest.fixture
def pixels(built_repository: Path) -> Pixels:
    """The golden digits: [10, 32, 32, 1]."""
    folder = built_repository / "lenet5" / "1"
    return reader.open_version(folder).golden.pixels


def test_every_backend_has_a_module_and_every_other_file_is_known() -> None:
    folder = Path(base.__file__).parent
    shared = {"__init__", "__pycache__", "base", "golden_check", "onnx_precision", "record"}
    assert {path.stem for path in folder.iterdir()} - shared == set(BACKENDS)


def test_an_unknown_backend_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="'os' is unknown; choose one of openvino, tensorrt, inductor, null"
    ):
        backend("os")


def test_a_backend_reports_its_version_hardware_and_precisions(compiled: Compiled) -> None:
    subject = compiled.backend
    assert subject.version()
    assert subject.hardware()
    assert "fp32" in subject.precisions()
    assert subject.best_precision() in subject.precisions()
    assert subject.incompatibility(compiled.record) is None


def test_compiling_writes_exactly_the_recorded_files(compiled: Compiled) -> None:
    there = sorted(path.name for path in compiled.folder.iterdir())
    assert there == sorted(file.name for file in compiled.record.files)


def test_outputs_have_the_promised_shape_for_every_batch_size(
    engine: Engine, pixels: Pixels
) -> None:
    assert engine.max_batch == MAX_BATCH
    for instance in engine.instances:
        assert instance.pixels.shape == (MAX_BATCH, 32, 32, 1)
        assert instance.pixels.dtype == np.uint8
        assert 1 <= instance.units <= engine.units
        for rows in range(1, MAX_BATCH + 1):
            classes, scores, probabilities = infer(instance, pixels[:rows])
            answer = (classes, scores, probabilities)
            assert [array.shape for array in answer] == [(rows, CLASSES)] * 3
            assert [array.dtype.name for array in answer] == ["int32", "float32", "float32"]
            by_class = np.take_along_axis(probabilities, classes, axis=1)
            np.testing.assert_array_equal(by_class, scores)
            assert (np.diff(scores) <= 0).all()
            np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=0.02)


def test_a_row_gets_the_same_answer_alone_in_a_batch_and_at_any_position(
    compiled: Compiled, engine: Engine, pixels: Pixels
) -> None:
    limit = MAX_ROW_DEVIATION[compiled.record.precision]
    instance = engine.instances[0]
    chosen = pixels[:MAX_BATCH]
    together = infer(instance, chosen)
    scale = deviation_scale(together.probabilities)
    alone = [infer(instance, chosen[row : row + 1]).probabilities for row in range(MAX_BATCH)]
    assert deviation(together.probabilities, np.concatenate(alone), scale) <= limit
    order = np.array([3, 0, 4, 1, 2])
    moved = infer(instance, chosen[order]).probabilities
    assert deviation(together.probabilities[order], moved, scale[order]) <= limit


def test_a_later_batch_does_not_change_earlier_outputs(engine: Engine, pixels: Pixels) -> None:
    instance = engine.instances[0]
    first = infer(instance, pixels[:3])
    before = [array.copy() for array in first]
    infer(instance, pixels[5:8])
    for array, copy in zip(first, before, strict=True):
        assert np.array_equal(array, copy)


def test_instances_can_run_at_the_same_time(engine: Engine, pixels: Pixels) -> None:
    expected = [infer(engine.instances[0], pixels[n : n + 2]).classes[:, 0] for n in range(4)]
    for _ in range(20):
        answers: list[SimpleQueue[Outputs | Exception]] = []
        for n, instance in enumerate(engine.instances):
            instance.pixels[:2] = pixels[n : n + 2]
            answers.append(SimpleQueue())
            instance.start(2, answers[-1].put)
        for n, queue in enumerate(answers):
            answer = queue.get()
            assert isinstance(answer, Outputs)
            assert np.array_equal(answer.classes[:, 0], expected[n])


def test_on_done_is_called_exactly_once(engine: Engine, pixels: Pixels) -> None:
    instance = engine.instances[0]
    instance.pixels[:1] = pixels[:1]
    calls: list[object] = []
    for times in range(1, 51):
        answered = threading.Event()

        def on_done(answer: object, answered: threading.Event = answered) -> None:
            calls.append(answer)
            answered.set()

        instance.start(1, on_done)
        answered.wait()
        assert len(calls) == times
    engine.close()
    assert len(calls) == 50


def test_closing_frees_the_memory_and_is_safe_twice(compiled: Compiled) -> None:
    engine = compiled.load()
    infer(engine.instances[0], engine.instances[0].pixels[:1])
    instances = [weakref.ref(instance) for instance in engine.instances]
    engine.close()
    engine.close()
    gc.collect()
    assert [instance() for instance in instances] == [None] * len(instances)


def test_loading_a_damaged_engine_fails_and_names_the_file(compiled: Compiled) -> None:
    name = compiled.record.files[0].name
    for content in (b"", b"\x00" * 100, b"{}", b'{"classes": 1e9, "top_k": 1}', b"<net></net>"):
        (compiled.folder / name).write_bytes(content)
        with pytest.raises(EngineFailure, match=name):
            compiled.load()
    (compiled.folder / name).unlink()
    with pytest.raises(EngineFailure, match=name):
        compiled.load()


def test_compiling_a_file_that_is_not_a_network_fails(compiled: Compiled, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    for content in (b"", b"no network"):
        bad.write_bytes(content)
        with pytest.raises(EngineFailure, match=r"bad\.onnx"):
            compiled.backend.compile(bad, tmp_path, CompileOptions("fp32", 1))


def test_openvino_says_why_it_can_not_run_an_engine(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.record.backend != "openvino":
        pytest.skip("OpenVINO only")
    incompatibility = compiled.backend.incompatibility

    def changed(**fields: str) -> EngineRecord:
        return msgspec.structs.replace(compiled.record, **fields)

    assert "precision 'int4' is unknown" in (incompatibility(changed(precision="int4")) or "")
    assert "was compiled by OpenVINO 2019.1.0" in (
        incompatibility(changed(backend_version="2019.1.0")) or ""
    )
    monkeypatch.setattr("server.engines.openvino._cpu_flags", lambda: {"avx2"})
    for precision in ("bf16", "fp16"):
        reason = incompatibility(changed(precision=precision)) or ""
        assert f"it computes in {precision}, but this CPU has none of" in reason
        assert "build it with --precision fp32" in reason
    assert incompatibility(changed(precision="fp32")) is None
    assert incompatibility(changed(precision="int8")) is None
    assert compiled.backend.precisions() == ["fp32", "int8"]


@pytest.mark.parametrize(("runs_s", "tiny"), [([0.03, 0.002, 0.0001], True), ([0.03], False)])
def test_a_network_is_tiny_if_any_run_is_fast(runs_s: list[float], tiny: bool) -> None:
    class TimedInstance:
        """An instance whose runs take `runs_s`; the last of them repeats."""

        def __init__(self) -> None:
            self.pixels = np.zeros((1, 2, 2, 1), np.uint8)
            self.runs = 0

        def start(self, rows: int, on_done: OnDone) -> None:
            self.runs += 1
            scores = np.zeros((rows, 1), np.float32)
            on_done(Outputs(scores.astype(np.int32), scores, scores))

        def last_run_s(self) -> float:
            return runs_s[min(self.runs, len(runs_s)) - 1]

    instance: Any = TimedInstance()
    assert openvino._is_tiny(instance) is tiny
    assert instance.runs <= 5
