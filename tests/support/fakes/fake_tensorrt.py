"""A fake of the TensorRT library that runs on a CudaRecorder. It loads and runs plans.

The enumerations and the logger are those of the real TensorRT-RTX.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from server.engines.tensorrt.libraries import import_library
from server.images.input_spec import Pixels
from server.repository.manifest import EngineRecord
from tests.support.fakes.cuda_recorder import CudaRecorder

trt: Any = import_library("rtx")

SHAPE = (2, 3, 1)
CLASSES = 5


def fake_record(**fields: Any) -> EngineRecord:
    defaults: dict[str, Any] = {
        "name": "fake",
        "backend": "tensorrt",
        "backend_version": "rtx 1",
        "precision": "fp16",
        "hardware": "sm89",
        "max_batch": 6,
        "files": (),
        "deviation": {},
    }
    return EngineRecord(**defaults | fields)


def images_of(*classes: int) -> Pixels:
    """One image for each class, which FakeContext classifies as that class."""
    pixels = np.zeros((len(classes), *SHAPE), np.uint8)
    pixels[:, 0, 0, 0] = classes
    return pixels


class FakeContext:
    """An IExecutionContext. The best class of a row [H, W, C] is the value of its first byte."""

    def __init__(
        self,
        cuda: CudaRecorder,
        shape: tuple[int, int, int],
        classes: int,
        *,
        capturable: bool = True,
    ) -> None:
        self._layers = 0
        self._cuda = cuda
        self._shape = shape
        self._classes = classes
        self._capturable = capturable
        self._addresses: dict[str, int] = {}
        self._rows = 0
        self.accepts: Callable[[int], bool] = lambda rows: True  # which batch sizes are valid
        self.runs = True  # whether executing succeeds

    def set_device_memory(self, memory: int, size: int) -> None:
        assert len(self._cuda.content(memory)) >= size
        self._layers = memory

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._cuda.calls.append(("set_input_shape", shape[0]))
        self._rows = shape[0]
        return self.accepts(shape[0])

    def is_stream_capturable(self, stream: int) -> bool:
        return self._capturable

    def execute_async_v3(self, stream: int) -> bool:
        self._cuda.calls.append(("execute", self._rows, stream))
        if not self.runs or self._layers not in self._cuda.live:
            return False
        rows, cuda, at = self._rows, self._cuda, dict(self._addresses)

        def compute() -> None:
            row_bytes = int(np.prod(self._shape))
            first = cuda.content(at["pixels"])[: rows * row_bytes : row_bytes].astype(np.int32)
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
                cuda.content(at[name])[: len(content)] = content

        cuda.enqueue(stream, compute)
        return True


class FakeTensorRt:
    """The library for datacenter GPUs. It does not read plans; an empty one counts as damaged.

    `contexts` lists all contexts that were created, `configs` the configurations they got.
    """

    __version__ = "1"
    ILogger = trt.ILogger
    ExecutionContextAllocationStrategy = trt.ExecutionContextAllocationStrategy

    def __init__(self, cuda: CudaRecorder, shape: tuple[int, int, int], classes: int) -> None:
        self.cuda = cuda
        self.shape = shape
        self.classes = classes
        self.layers_bytes = 1000
        self.contexts: list[FakeContext] = []
        self.configs: list[Any] = []
        self.runs = True

    def Runtime(self, logger: Any) -> FakeRuntime:  # noqa: N802 (TensorRT's name)
        return FakeRuntime(self, logger)


class FakeTensorRtRtx(FakeTensorRt):
    CudaGraphStrategy = trt.CudaGraphStrategy
    DynamicShapesKernelSpecializationStrategy = trt.DynamicShapesKernelSpecializationStrategy


class FakeRuntime:
    def __init__(self, library: FakeTensorRt, logger: Any) -> None:
        self._library = library
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> FakeNetwork | None:
        if not plan:
            self._logger.log(trt.ILogger.Severity.ERROR, "magicTag does not match")
            return None
        return FakeNetwork(self._library)


class FakeNetwork:
    """An ICudaEngine."""

    def __init__(self, library: FakeTensorRt) -> None:
        self._library = library
        self.device_memory_size_v2 = library.layers_bytes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, self._library.classes if name == "probabilities" else 2)

    def create_runtime_config(self) -> FakeConfig:
        return FakeRtxConfig() if isinstance(self._library, FakeTensorRtRtx) else FakeConfig()

    def create_execution_context(self, config: Any) -> FakeContext:
        """`config` is an allocation strategy, or a configuration that contains one."""
        strategy = config.strategy if isinstance(config, FakeConfig) else config
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        library = self._library
        context = FakeContext(library.cuda, library.shape, library.classes)
        context.runs = library.runs
        library.contexts.append(context)
        library.configs.append(config)
        return context


class FakeConfig:
    """An IRuntimeConfig. Like the original, it rejects unknown attributes."""

    __slots__ = ("strategy",)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class FakeRtxConfig(FakeConfig):
    """The IRuntimeConfig of TensorRT-RTX."""

    __slots__ = (
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "runtime_cache",
    )

    def create_runtime_cache(self) -> object:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: object) -> bool:
        self.runtime_cache = weakref.ref(
            cache
        )  # like the original, it does not keep the cache alive
        return True


class FakeRuntimeCache:
    """An IRuntimeCache."""
