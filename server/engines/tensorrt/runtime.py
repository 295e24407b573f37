"""Runs a TensorRT plan.

An instance has an execution context, a stream, page-locked input and output memory, and one CUDA
graph for each batch size. A graph copies the input in, computes, and copies the outputs back. So a
batch is one launch. A thread of the instance waits until it is complete. There are two instances,
so that one batch can be copied while the other computes.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.engines.base import OnDone, Outputs, graph_sizes, padded_size
from server.engines.tensorrt.cuda import Cuda, CudaError
from server.errors import DeviceLost, EngineFailure
from server.images.input_spec import Pixels
from server.repository.manifest import EngineRecord

log = logging.getLogger(__name__)

INSTANCES = 2
OUTPUTS: dict[str, np.dtype[Any]] = {
    "classes": np.dtype(np.int32),
    "scores": np.dtype(np.float32),
    "probabilities": np.dtype(np.float32),
}


class Buffers(NamedTuple):
    """The memory of one tensor on the device and on the host."""

    name: str
    device: int
    host: int
    rows: NDArray[Any]  # view of the host memory
    row_bytes: int


class TensorRtInstance:
    """An execution context with everything it needs to run a batch; see the top of this file.

    `cuda` is a tensorrt.cuda.Cuda or a fake of it; `context` is TensorRT's IExecutionContext.
    """

    units = 1

    def __init__(
        self,
        cuda: Cuda,
        context: Any,
        sizes: Sequence[int],
        shape: tuple[int, int, int],
        widths: dict[str, int],
        layers_bytes: int,
    ) -> None:
        self._cuda = cuda
        self._context = context
        self._sizes = sizes
        self._graphs: dict[int, int | None] = {}  # by batch size; None if it can't be captured
        self._pinned: list[int] = []
        self._memory: list[int] = []
        # Rows, callback, and the error if the batch could not be started.
        self._jobs: SimpleQueue[tuple[int, OnDone, Exception | None] | None] = SimpleQueue()
        self._waiter: threading.Thread | None = None
        self._stream = self._event = 0
        try:
            self._stream, self._event = cuda.create_stream(), cuda.create_event()
            self._memory.append(cuda.allocate(max(1, layers_bytes)))
            context.set_device_memory(self._memory[0], layers_bytes)
            self._input = self._buffers("pixels", shape, np.dtype(np.uint8))
            self._outputs = [
                self._buffers(name, (widths[name],), dtype) for name, dtype in OUTPUTS.items()
            ]
            self.pixels: Pixels = self._input.rows
            for size in sizes:
                self._graphs[size] = self._warm_up_and_capture(size)
            self._waiter = threading.Thread(target=self._finish_jobs, name="tensorrt", daemon=True)
            self._waiter.start()
        except BaseException:
            self.close()
            raise

    def start(self, rows: int, on_done: OnDone) -> None:
        size = padded_size(rows, self._sizes)
        error: Exception | None = None
        try:
            graph = self._graphs[size]
            if graph is None:
                self._set_batch_size(size)
                self._enqueue(size)
            else:
                self._cuda.launch_graph(graph, self._stream)
            self._cuda.record_event(self._event, self._stream)
        except (CudaError, EngineFailure) as failed:
            error = failed
        self._jobs.put((rows, on_done, error))

    @property
    def captured(self) -> list[int]:
        """The batch sizes that have a CUDA graph."""
        return [size for size, graph in self._graphs.items() if graph is not None]

    def close(self) -> None:
        """Frees everything. Safe to call twice, and on an instance that is only partly made."""
        if self._waiter is not None:
            self._jobs.put(None)
            self._waiter.join()
            self._waiter = None
        cuda, self.pixels = self._cuda, np.empty((0, 0, 0, 0), np.uint8)
        self._input = self._outputs = None  # type: ignore[assignment]
        self._context = None
        graphs = [graph for graph in self._graphs.values() if graph]
        for free, handles in (
            (cuda.destroy_graph, graphs),
            (cuda.destroy_event, [self._event]),
            (cuda.destroy_stream, [self._stream]),
            (cuda.free, self._memory),
            (cuda.free_pinned, self._pinned),
        ):
            for handle in handles:
                with suppress(CudaError):  # the device is lost
                    if handle:
                        free(handle)
        self._graphs, self._memory, self._pinned = {}, [], []
        self._stream = self._event = 0

    def _finish_jobs(self) -> None:
        """Runs in the instance's thread: waits for each batch, then calls its `on_done`.

        If a batch could not be started, this first waits until the stream is empty. That wait also
        reveals a lost device, which TensorRT itself does not report.
        """
        while (job := self._jobs.get()) is not None:
            rows, on_done, start_error = job
            outcome: Outputs | Exception
            try:
                if start_error is not None:
                    self._cuda.synchronize(self._stream)
                    raise start_error
                self._cuda.wait_event(self._event)
                outcome = Outputs(*(buffers.rows[:rows].copy() for buffers in self._outputs))
            except CudaError as error:
                outcome = failure(error, f"CUDA: {error}")
            except EngineFailure as error:
                outcome = error
            on_done(outcome)

    def _buffers(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffers:
        """Allocates a tensor for the largest batch and gives its address to the context."""
        row_bytes = math.prod(shape) * dtype.itemsize
        size = self._sizes[-1] * row_bytes
        host, content = self._cuda.allocate_pinned(size)
        self._pinned.append(host)
        content[:] = 0
        device = self._cuda.allocate(size)
        self._memory.append(device)
        if not self._context.set_tensor_address(name, device):
            raise EngineFailure(f"TensorRT rejects the memory for {name}")
        return Buffers(name, device, host, content.view(dtype).reshape(-1, *shape), row_bytes)

    def _warm_up_and_capture(self, size: int) -> int | None:
        """The graph of a batch size, or None if it can't be captured.

        The first run compiles the kernels for the size. Without a graph each batch is enqueued
        call by call, which costs more processor time.
        """
        self._set_batch_size(size)
        try:
            self._enqueue(size)
        finally:
            self._cuda.synchronize(self._stream)  # reports a lost device; TensorRT does not
        is_capturable = getattr(self._context, "is_stream_capturable", None)
        reason = "TensorRT says that the stream is not capturable"
        if is_capturable is None or is_capturable(self._stream):
            try:
                return self._capture(size)
            except CudaError as error:
                if error.sticky:
                    raise
                reason = str(error)
            except EngineFailure as error:
                reason = str(error)
        log.warning("graph_not_captured", extra={"rows": size, "reason": reason})
        return None

    def _capture(self, size: int) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue(size)
        except BaseException:
            with suppress(CudaError):  # in any case, end the capture of the stream
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)

    def _set_batch_size(self, size: int) -> None:
        if not self._context.set_input_shape(self._input.name, (size, *self.pixels.shape[1:])):
            raise EngineFailure(f"TensorRT rejects batch size {size}")

    def _enqueue(self, size: int) -> None:
        cuda, stream, pixels = self._cuda, self._stream, self._input
        cuda.copy_to_device(pixels.device, pixels.host, size * pixels.row_bytes, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineFailure(f"TensorRT can't run a batch of {size}")
        for output in self._outputs:
            cuda.copy_to_host(output.host, output.device, size * output.row_bytes, stream)


class TensorRtEngine:
    """A plan on the GPU. `keep` holds the objects that must live as long as its contexts."""

    device = "gpu"
    units = INSTANCES

    def __init__(
        self,
        cuda: Cuda,
        contexts: Sequence[Any],
        record: EngineRecord,
        shape: tuple[int, int, int],
        widths: dict[str, int],
        layers_bytes: int,
        keep: Any = None,
    ) -> None:
        self.max_batch = record.max_batch
        self._sizes = graph_sizes(record)
        self._keep = keep
        self.instances: list[TensorRtInstance] = []
        try:
            for context in contexts:
                self.instances.append(
                    TensorRtInstance(cuda, context, self._sizes, shape, widths, layers_bytes)
                )
        except BaseException:
            self.close()
            raise

    def computed_rows(self, rows: int) -> int:
        return padded_size(rows, self._sizes)

    def close(self) -> None:
        instances, self.instances = self.instances, []
        for instance in instances:
            instance.close()
        self._keep = None


def create_contexts(trt: Any, network: Any, name: str) -> tuple[list[Any], Any]:
    """An execution context for each instance, and the objects that must live as long as these.

    The user of a context must give it memory for its layers. Raises EngineFailure.
    """
    config: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    kernels = None
    if hasattr(trt, "CudaGraphStrategy"):  # TensorRT-RTX
        strategy, config = config, network.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # A CUDA graph keeps the kernels that were captured. So kernels are specialised for a batch
        # size at once, before the capture, and not in the background.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        # TensorRT-RTX must not capture graphs itself, because the instances do so.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        kernels = config.create_runtime_cache()  # so that contexts share their compiled kernels
        config.set_runtime_cache(kernels)
    contexts = [network.create_execution_context(config) for _ in range(INSTANCES)]
    if any(context is None for context in contexts):
        raise EngineFailure(f"TensorRT can't create an execution context for {name}")
    return contexts, (kernels, config)


def output_widths(network: Any, name: str) -> dict[str, int]:
    """How many numbers a row of each output has.

    Raises EngineFailure if the plan was not made by this project.
    """
    try:
        shapes = {output: tuple(network.get_tensor_shape(output)) for output in OUTPUTS}
        return {output: int(shape[1]) for output, shape in shapes.items()}
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise EngineFailure(
            f"{name} must have the outputs {', '.join(OUTPUTS)}: {error}"
        ) from error


def failure(error: CudaError, message: str) -> EngineFailure:
    """DeviceLost if the CUDA error is sticky, else a plain EngineFailure."""
    return DeviceLost(message) if error.sticky else EngineFailure(message)
