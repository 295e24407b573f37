"""The order of copies, launches and events, on a fake of CUDA. No GPU is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from server.engines.base import Outputs, graph_sizes, infer
from server.engines.tensorrt.cuda import CudaError
from server.engines.tensorrt.runtime import TensorRtEngine
from server.errors import DeviceLost, EngineFailure
from tests.support.fakes.cuda_recorder import CudaRecorder
from tests.support.fakes.fake_tensorrt import (
    CLASSES,
    SHAPE,
    FakeContext,
    fake_record,
    images_of,
)

WIDTHS = {"classes": 2, "scores": 2, "probabilities": CLASSES}
LAYERS_BYTES = 1000


@pytest.fixture
def cuda() -> CudaRecorder:
    return CudaRecorder()


def make_engine(cuda: CudaRecorder, contexts: int = 2, **fields: Any) -> TensorRtEngine:
    fakes = [FakeContext(cuda, SHAPE, CLASSES) for _ in range(contexts)]
    return TensorRtEngine(cuda, fakes, fake_record(**fields), SHAPE, WIDTHS, LAYERS_BYTES)


@pytest.fixture
def engine(cuda: CudaRecorder) -> Iterator[TensorRtEngine]:
    engine = make_engine(cuda)
    yield engine
    cuda.may_finish.set()
    engine.close()
    assert not cuda.live, "all memory and handles are freed"


def test_graph_sizes_are_powers_of_two_the_optimum_and_both_ends_of_the_range() -> None:
    assert graph_sizes(fake_record(max_batch=6)) == [1, 2, 4, 6]
    assert graph_sizes(fake_record(max_batch=8, opt_batch=5)) == [1, 2, 4, 5, 8]
    assert graph_sizes(fake_record(max_batch=1)) == [1]
    assert graph_sizes(fake_record(max_batch=16, min_batch=3)) == [3, 4, 8, 16]


def test_every_batch_size_gets_its_own_answers(engine: TensorRtEngine) -> None:
    for instance in engine.instances:
        for count in (6, 1, 5, 2, 4, 3):
            classes = [(3 * count + row) % CLASSES for row in range(count)]
            answer = infer(instance, images_of(*classes))
            assert answer.classes[:, 0].tolist() == classes
            assert answer.probabilities.shape == (count, CLASSES)


def test_each_batch_size_has_one_graph_and_a_batch_is_one_launch(
    cuda: CudaRecorder, engine: TensorRtEngine
) -> None:
    assert cuda.names().count("begin_capture") == 4 * len(engine.instances)
    assert all(instance.captured == [1, 2, 4, 6] for instance in engine.instances)
    cuda.calls.clear()
    for count in (1, 3, 6, 3):
        infer(engine.instances[0], images_of(*[1] * count))
    assert cuda.names() == ["launch_graph", "record_event", "wait_event"] * 4
    graphs = [call[1] for call in cuda.calls if call[0] == "launch_graph"]
    assert graphs[1] == graphs[3]
    assert len(set(graphs)) == 3


def test_a_graph_copies_in_computes_and_copies_back_in_one_stream(cuda: CudaRecorder) -> None:
    engine = make_engine(cuda, contexts=1, max_batch=2)
    first, last = cuda.names().index("begin_capture"), cuda.names().index("end_capture")
    captured = cuda.calls[first + 1 : last]
    stream = cuda.calls[first][1]
    assert captured == [
        ("copy_to_device", 6, stream),
        ("execute", 1, stream),
        ("copy_to_host", 8, stream),
        ("copy_to_host", 8, stream),
        ("copy_to_host", 4 * CLASSES, stream),
    ]
    assert cuda.calls[first - 1] == ("synchronize", stream), "a first run comes before the capture"
    engine.close()


def test_instances_overlap_and_outputs_are_read_only_after_the_event(
    cuda: CudaRecorder, engine: TensorRtEngine
) -> None:
    left, right = engine.instances
    cuda.may_finish.clear()
    cuda.calls.clear()
    answers: list[SimpleQueue[Outputs | Exception]] = [SimpleQueue(), SimpleQueue()]
    for instance, classes, queue in ((left, 1, answers[0]), (right, 2, answers[1])):
        instance.pixels[:1] = images_of(classes)
        instance.start(1, queue.put)
    assert cuda.names() == ["launch_graph", "record_event"] * 2, (
        "the second does not wait for the first"
    )
    (_, left_graph, left_stream), _, (_, right_graph, right_stream), _ = cuda.calls
    assert left_stream != right_stream
    assert left_graph != right_graph
    assert all(queue.empty() for queue in answers)
    cuda.may_finish.set()
    for queue, classes in zip(answers, (1, 2), strict=True):
        answer = queue.get()
        assert isinstance(answer, Outputs)
        assert answer.classes[:, 0].tolist() == [classes]


def test_a_batch_is_padded_to_the_next_graph_size(
    engine: TensorRtEngine,
) -> None:
    assert [engine.computed_rows(count) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_a_later_batch_does_not_change_earlier_outputs(engine: TensorRtEngine) -> None:
    first = infer(engine.instances[0], images_of(1, 2))
    infer(engine.instances[0], images_of(3, 4))
    assert first.classes[:, 0].tolist() == [1, 2]


def test_without_a_graph_each_batch_is_enqueued_call_by_call(cuda: CudaRecorder) -> None:
    context = FakeContext(cuda, SHAPE, CLASSES, capturable=False)
    engine = TensorRtEngine(cuda, [context], fake_record(), SHAPE, WIDTHS, LAYERS_BYTES)
    assert "begin_capture" not in cuda.names()
    assert engine.instances[0].captured == []
    cuda.calls.clear()
    answer = infer(engine.instances[0], images_of(1, 2, 3))
    assert answer.classes[:, 0].tolist() == [1, 2, 3]
    assert cuda.names() == [
        "set_input_shape",
        "copy_to_device",
        "execute",
        *["copy_to_host"] * 3,
        "record_event",
        "wait_event",
    ]
    engine.close()


@pytest.mark.parametrize("call", ["launch_graph", "record_event", "wait_event"])
def test_a_failed_call_fails_its_batch_only(
    call: str, cuda: CudaRecorder, engine: TensorRtEngine
) -> None:
    instance = engine.instances[0]
    cuda.fail[call] = "cudaErrorLaunchOutOfResources"
    with pytest.raises(EngineFailure, match="cudaErrorLaunchOutOfResources") as caught:
        infer(instance, images_of(1))
    assert not isinstance(caught.value, DeviceLost)
    cuda.fail.clear()
    assert infer(instance, images_of(2)).classes[0, 0] == 2


@pytest.mark.parametrize("call", ["launch_graph", "wait_event"])
def test_a_sticky_error_means_that_the_device_is_lost(
    call: str, cuda: CudaRecorder, engine: TensorRtEngine
) -> None:
    cuda.fail[call] = "cudaErrorIllegalAddress"
    with pytest.raises(DeviceLost, match="cudaErrorIllegalAddress"):
        infer(engine.instances[0], images_of(1))


@pytest.mark.parametrize("lost", [False, True])
def test_a_batch_that_can_not_start_fails_and_a_lost_device_is_recognised(
    cuda: CudaRecorder, *, lost: bool
) -> None:
    context = FakeContext(cuda, SHAPE, CLASSES, capturable=False)
    engine = TensorRtEngine(cuda, [context], fake_record(), SHAPE, WIDTHS, LAYERS_BYTES)
    context.runs = False
    cuda.fail = {"synchronize": "cudaErrorIllegalAddress"} if lost else {}
    with pytest.raises(EngineFailure) as caught:
        infer(engine.instances[0], images_of(1))
    assert isinstance(caught.value, DeviceLost) == lost
    assert cuda.names()[-1] == "synchronize", "the batch fails only when the stream is empty"
    cuda.fail, context.runs = {}, True
    assert infer(engine.instances[0], images_of(2)).classes[0, 0] == 2
    engine.close()


def test_a_batch_size_that_is_rejected_later_fails_its_batch(cuda: CudaRecorder) -> None:
    context = FakeContext(cuda, SHAPE, CLASSES, capturable=False)
    engine = TensorRtEngine(cuda, [context], fake_record(), SHAPE, WIDTHS, LAYERS_BYTES)
    context.accepts = lambda rows: False
    with pytest.raises(EngineFailure, match="rejects batch size 4"):
        infer(engine.instances[0], images_of(1, 2, 3))
    engine.close()


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
def test_if_the_capture_fails_batches_are_enqueued(call: str, cuda: CudaRecorder) -> None:
    cuda.fail[call] = "cudaErrorStreamCaptureUnsupported"
    engine = make_engine(cuda, contexts=1)
    assert infer(engine.instances[0], images_of(1, 2, 3)).classes[:, 0].tolist() == [1, 2, 3]
    assert "launch_graph" not in cuda.names()
    engine.close()


@pytest.mark.parametrize("call", ["allocate", "copy_to_device", "synchronize", "end_capture"])
def test_a_failed_load_frees_everything(call: str, cuda: CudaRecorder) -> None:
    threads = threading.active_count()
    for _ in range(200):
        cuda.fail[call] = "cudaErrorLaunchFailure"
        with pytest.raises(CudaError):
            make_engine(cuda)
        assert not cuda.live
    assert threading.active_count() == threads


def test_a_batch_size_that_the_plan_rejects_fails_the_load_and_frees_everything(
    cuda: CudaRecorder,
) -> None:
    context = FakeContext(cuda, SHAPE, CLASSES)
    context.accepts = lambda rows: rows < 4
    with pytest.raises(EngineFailure, match="rejects batch size 4"):
        TensorRtEngine(cuda, [context], fake_record(), SHAPE, WIDTHS, LAYERS_BYTES)
    assert not cuda.live
