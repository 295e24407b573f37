"""Stand-in for tensorrt/cuda.py and TensorRT that records what an engine asks of them.

No GPU is needed to see in which order an engine copies, launches and waits.

It does the work too, but only when it would be done: a stream's operations run when somebody waits
for them. Whoever reads too early reads what was there before.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.engines import tensorrt
from server.engines.tensorrt.cuda import Cuda, CudaError, Gpu

trt: Any = tensorrt._library("rtx")  # its enumerations are as good as the original

Operation = Callable[[], None]


class Tape(Cuda):
    """Every call, as a tuple, in `calls`; every handle not given back, in `live`.

    `fail` maps the name of a call to the error it shall raise. While `held` is set, waits wait.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.live: set[int] = set()
        self.fail: dict[str, str] = {}
        self.free_bytes = 8 << 30
        self.held = threading.Event()
        self.held.set()
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._streams: dict[int, list[Operation]] = {}
        self._captures: dict[int, list[Operation]] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._numbers = itertools.count(1000)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def gpu(self) -> Gpu:
        self._record("gpu")
        return Gpu("Taped", "sm89", cuda=13000, needed=13000, free_bytes=self.free_bytes)

    def pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        address = self.memory(size)
        return address, self._memory[address]

    def memory(self, size: int) -> int:
        self._record("memory", size)
        address = self._new()
        self._memory[address] = np.full(size, 7, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.live.remove(address)
        del self._memory[address]

    free_pinned = free

    def copy_in(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy("copy_in", to, source, size, stream)

    def copy_out(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy("copy_out", to, source, size, stream)

    def stream(self) -> int:
        number = self._new()
        self._streams[number] = []
        return number

    def event(self) -> int:
        return self._new()

    def free_stream(self, stream: int) -> None:
        self.live.remove(stream)

    def free_event(self, event: int) -> None:
        self.live.remove(event)

    def free_graph(self, graph: int) -> None:
        self.live.remove(graph)

    def record(self, event: int, stream: int) -> None:
        self._record("record", stream)
        self._streams[event] = self._streams[stream]

    def wait(self, event: int) -> None:
        self.held.wait()
        self._record("wait", event)
        self._run(event)

    def finish(self, stream: int) -> None:
        self._record("finish", stream)
        self._run(stream)

    def begin_capture(self, stream: int) -> None:
        self._record("begin_capture", stream)
        self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        operations = self._captures.pop(stream)
        self._record("end_capture", stream)
        graph = self._new()
        self._graphs[graph] = operations
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._record("launch", graph, stream)
        self._streams[stream] += self._graphs[graph]

    def enqueue(self, stream: int, operation: Operation) -> None:
        """Work of the context's."""
        self._captures.get(stream, self._streams[stream]).append(operation)

    def content(self, address: int) -> NDArray[np.uint8]:
        return self._memory[address]

    def _copy(self, name: str, to: int, source: int, size: int, stream: int) -> None:
        self._record(name, size, stream)

        def copy() -> None:
            self._memory[to][:size] = self._memory[source][:size]

        self.enqueue(stream, copy)

    def _run(self, stream: int) -> None:
        operations, self._streams[stream][:] = list(self._streams[stream]), []
        for operation in operations:
            operation()

    def _record(self, name: str, *details: int) -> None:
        self.calls.append((name, *details))
        if name in self.fail:
            raise CudaError(self.fail[name], name)

    def _new(self) -> int:
        number = next(self._numbers)
        self.live.add(number)
        return number


class TapedContext:
    """Finds a row to be of the class its first byte names, for [rows, H, W, C] of `shape`."""

    def __init__(
        self, tape: Tape, shape: tuple[int, int, int], classes: int, *, capturable: bool = True
    ) -> None:
        self._layers = 0
        self._tape = tape
        self._shape = shape
        self._classes = classes
        self._capturable = capturable
        self._addresses: dict[str, int] = {}
        self._rows = 0
        self.takes: Callable[[int], bool] = lambda rows: True  # which batch sizes it takes
        self.runs = True  # whether it can be run

    def set_device_memory(self, memory: int, size: int) -> None:
        assert len(self._tape.content(memory)) >= size
        self._layers = memory

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._tape.calls.append(("shape", shape[0]))
        self._rows = shape[0]
        return self.takes(shape[0])

    def is_stream_capturable(self, stream: int) -> bool:
        return self._capturable

    def execute_async_v3(self, stream: int) -> bool:
        self._tape.calls.append(("execute", self._rows, stream))
        if not self.runs or self._layers not in self._tape.live:
            return False
        rows, tape, at = self._rows, self._tape, dict(self._addresses)

        def compute() -> None:
            row_bytes = int(np.prod(self._shape))
            first = tape.content(at["pixels"])[: rows * row_bytes : row_bytes].astype(np.int32)
            top: Any = (first[:, np.newaxis] + np.arange(2, dtype=np.int32)) % self._classes
            scores = np.tile(np.array([0.75, 0.25], np.float32), (rows, 1))
            probabilities = np.zeros((rows, self._classes), np.float32)
            np.put_along_axis(probabilities, top, scores, axis=1)
            for name, values in (
                ("classes", top),
                ("scores", scores),
                ("probabilities", probabilities),
            ):
                content = np.frombuffer(values.tobytes(), np.uint8)
                tape.content(at[name])[: len(content)] = content

        tape.enqueue(stream, compute)
        return True


class TapedLibrary:
    """TensorRT as far as it loads and runs a plan; what it logs to is TensorRT-RTX's own.

    Of the plan's content nothing is read; a damaged one is empty. `contexts` are all that were
    made, `configs` what they were made with.
    """

    __version__ = "1"
    ILogger = trt.ILogger
    ExecutionContextAllocationStrategy = trt.ExecutionContextAllocationStrategy

    def __init__(self, tape: Tape, shape: tuple[int, int, int], classes: int) -> None:
        self.tape = tape
        self.shape = shape
        self.classes = classes
        self.layers_bytes = 1000
        self.contexts: list[TapedContext] = []
        self.configs: list[Any] = []
        self.runs = True

    def Runtime(self, logger: Any) -> TapedRuntime:  # noqa: N802 (its name)
        return TapedRuntime(self, logger)


class TapedRtx(TapedLibrary):
    CudaGraphStrategy = trt.CudaGraphStrategy
    DynamicShapesKernelSpecializationStrategy = trt.DynamicShapesKernelSpecializationStrategy


class TapedRuntime:
    def __init__(self, library: TapedLibrary, logger: Any) -> None:
        self._library = library
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> TapedNetwork | None:
        if not plan:
            self._logger.log(trt.ILogger.Severity.ERROR, "magicTag does not match")
            return None
        return TapedNetwork(self._library)


class TapedNetwork:
    """An ICudaEngine."""

    def __init__(self, library: TapedLibrary) -> None:
        self._library = library
        self.device_memory_size_v2 = library.layers_bytes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, self._library.classes if name == "probabilities" else 2)

    def create_runtime_config(self) -> TapedConfig:
        return TapedRtxConfig() if isinstance(self._library, TapedRtx) else TapedConfig()

    def create_execution_context(self, how: Any) -> TapedContext:
        """`how` is a strategy, or a configuration that holds one."""
        strategy = how.strategy if isinstance(how, TapedConfig) else how
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        library = self._library
        context = TapedContext(library.tape, library.shape, library.classes)
        context.runs = library.runs
        library.contexts.append(context)
        library.configs.append(how)
        return context


class TapedConfig:
    """TensorRT's IRuntimeConfig: like the original it takes no attribute it does not have."""

    __slots__ = ("strategy",)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class TapedRtxConfig(TapedConfig):
    """TensorRT-RTX's."""

    __slots__ = (
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "runtime_cache",
    )

    def create_runtime_cache(self) -> object:
        return TapedKernels()

    def set_runtime_cache(self, cache: object) -> bool:
        self.runtime_cache = weakref.ref(cache)  # keeps none alive, and reads it when it runs
        return True


class TapedKernels:
    """An IRuntimeCache."""
