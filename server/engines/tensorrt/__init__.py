"""TensorRT on a GPU, in both its flavours: `tensorrt` for datacenters, `rtx` (TensorRT-RTX).

Their Python interfaces are nearly the same. A plan belongs to the variant and the exact version
that compiled it, so it says itself which library runs it. TensorRT-RTX compiles on a machine
without a GPU; its plans get their machine code when they are loaded.

An instance is an execution context with a stream, page-locked input and output memory, and one CUDA
graph a batch size: copy in, compute, copy out. A batch is one launch; a thread of the instance
waits for its event. Two instances let one batch be copied while the other computes.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.engines.base import (
    CompiledEngine,
    CompileOptions,
    OnDone,
    Outputs,
    Progress,
    graph_sizes,
    ignore_progress,
    padded_size,
)
from server.engines.onnx_precision import convert_precision
from server.engines.tensorrt.cuda import (
    Absent,
    Cuda,
    CudaError,
    Gpu,
)
from server.errors import DeviceLost, EngineFailure
from server.images.input_spec import Pixels

if TYPE_CHECKING:
    from server.repository.manifest import EngineRecord

log = logging.getLogger(__name__)

VARIANTS = ("auto", "tensorrt", "rtx")
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
PRECISIONS = ("fp32", "bf16", "fp16")
OUTPUTS: dict[str, np.dtype[Any]] = {
    "classes": np.dtype(np.int32),
    "scores": np.dtype(np.float32),
    "probabilities": np.dtype(np.float32),
}

# What a plan is compiled for where there is no GPU to ask: Ampere and later, all that TensorRT-RTX
# lists. (Turing, sm75, has no bf16; name it to have it.)
PORTABLE = ("sm80", "sm86", "sm89", "sm120", "sm121")

INSTANCES = 2

# Device memory that a plan takes beside its own size, at the least: machine code and the context.
# What its layers take is known once it is there, see `load`.
BESIDE_BYTES = 512 << 20

ADVICE = "compile one here: python -m model_repo.build MODEL --add-engine --backend tensorrt"


def version() -> str:
    """Flavour and exact version, for example "rtx 1.6.1.120". Raises ImportError."""
    variant = _installed("auto")
    return f"{variant} {_library(variant).__version__}"


def hardware() -> str:
    """The GPU's compute capability, for example "sm90"; "none" where there is no GPU."""
    gpu = _gpu_or_none()
    return gpu.capability if gpu is not None else "none"


def best_precision() -> str:
    return "fp16"


def precisions() -> Sequence[str]:
    return PRECISIONS


def compile(
    onnx: Path, folder: Path, target: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Compiles for the GPU here; with TensorRT-RTX also without one, or for others by their compute
    capabilities ("sm89", "89").

    The graph's types are rewritten to the precision first, see
    server.engines.onnx_precision. Raises EngineFailure, of what the parser refuses with the node
    and what to change.
    """
    try:
        variant = _installed(target.variant)
    except ImportError as error:
        raise EngineFailure(str(error)) from None
    trt = _library(variant)
    gpu = _gpu_or_none()
    wanted = _capabilities(trt, variant, target.hardware, gpu)
    notes = _notes(trt)
    builder = trt.Builder(notes)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, notes)
    if not parser.parse(convert_precision(onnx, target.precision)):
        why = _complaints(parser) or notes.last()
        raise EngineFailure(f"{NAMES[variant]} can't compile {onnx.name}: {why}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what is left in float32 is so for its digits
    config.progress_monitor = monitor = _monitor(trt, progress)
    profile = builder.create_optimization_profile()
    pixels = network.get_input(0)
    row = tuple(pixels.shape)[1:]
    opt_batch = target.opt_batch or target.max_batch
    sizes = (target.min_batch, opt_batch, target.max_batch)
    profile.set_shape(pixels.name, *((rows, *row) for rows in sizes))
    config.add_optimization_profile(profile)
    if variant == "rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what allocates is not captured
        named = wanted if gpu is None or target.hardware else ("CURRENT",)
        config.num_compute_capabilities = len(named)
        for place, name in enumerate(named):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), place)
    with _TimingCache(trt, config, variant, gpu, target.cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineFailure(f"{NAMES[variant]} can't compile {onnx.name}: {notes.last()}")
    del monitor  # it must outlive what uses it
    release = f"{'rtx' if variant == 'rtx' else ''}{trt.__version__}"
    name = f"tensorrt-{target.precision}-{_span(trt, wanted)}-{release}"
    path = folder / f"{name}.plan"
    path.write_bytes(plan)
    return CompiledEngine(name, [path.name], " ".join(wanted), f"{variant} {trt.__version__}")


def incompatibility(record: EngineRecord) -> str | None:
    try:
        gpu = Cuda().gpu()
    except (Absent, CudaError) as error:
        return str(error)
    variant, _, compiled_by = record.backend_version.partition(" ")
    if variant not in NAMES:
        return f"it was compiled by {record.backend_version!r}, which is unknown here"
    try:
        here = str(_library(variant).__version__)
    except ImportError:
        return f"it needs {NAMES[variant]} {compiled_by}, which is not installed here"
    if here != compiled_by:
        return f"it was compiled by {NAMES[variant]} {compiled_by} and this is {here}; {ADVICE}"
    if gpu.cuda < gpu.needed:
        return (
            f"the NVIDIA driver runs CUDA {_dotted(gpu.cuda)} and the libraries here need "
            f"{_dotted(gpu.needed)}; install a newer driver"
        )
    if gpu.capability not in record.hardware.split():
        return (
            f"it was compiled for {record.hardware.replace(' ', ', ')} and this GPU, {gpu.name}, "
            f"is {gpu.capability}; {ADVICE}"
        )
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; there are {', '.join(PRECISIONS)}"
    needed = sum(file.bytes for file in record.files) + BESIDE_BYTES
    if gpu.free_bytes < needed:
        return (
            f"it needs about {needed >> 20:,} MiB of the GPU's memory and {gpu.free_bytes >> 20:,} "
            "MiB are free; serve fewer models, or stop what else uses the GPU"
        )
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> TensorRtEngine:
    name = record.files[0].name
    try:
        trt = _library(record.backend_version.partition(" ")[0])
        plan = (folder / name).read_bytes()
        cuda = Cuda()
    except (ImportError, OSError, Absent, CudaError) as error:
        raise EngineFailure(f"TensorRT can't load {name}: {error}") from error
    notes = _notes(trt)
    runtime = trt.Runtime(notes)
    try:
        network = runtime.deserialize_cuda_engine(plan)
        free_bytes = cuda.gpu().free_bytes
        if network is None:
            raise EngineFailure(f"TensorRT can't load {name}: {notes.last()}")
        layers_bytes = network.device_memory_size_v2
        if free_bytes < INSTANCES * layers_bytes:
            raise EngineFailure(
                f"{name} needs {INSTANCES * layers_bytes >> 20:,} MiB of the GPU's memory for its "
                f"layers and {free_bytes >> 20:,} MiB are free; serve fewer models, or build it "
                "with a smaller --max-batch"
            )
        contexts, kept = _contexts(trt, network, name)
        return TensorRtEngine(
            cuda,
            contexts,
            record,
            shape,
            _widths(network, name),
            layers_bytes,
            keep=(notes, runtime, network, kept),  # let go from the last to the first
        )
    except CudaError as error:
        why = "; ".join([str(error), *notes.errors])
        raise _failure(error, f"TensorRT can't load {name}: {why}") from error


class Buffers(NamedTuple):
    """A tensor's memory on the device and on the host."""

    name: str
    device: int
    host: int
    rows: NDArray[Any]  # of the host's
    row_bytes: int


class TensorRtInstance:
    """An execution context with all that a batch needs; see the top of this file.

    `cuda` is tensorrt.cuda.Cuda or does as it does, `context` TensorRT's IExecutionContext.
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
        self._graphs: dict[int, int | None] = {}  # None where the context can't be captured
        self._pinned: list[int] = []
        self._memory: list[int] = []
        # Rows, who is to be told, and what went wrong at the start.
        self._jobs: SimpleQueue[tuple[int, OnDone, Exception | None] | None] = SimpleQueue()
        self._waiter: threading.Thread | None = None
        self._stream = self._event = 0
        try:
            self._stream, self._event = cuda.stream(), cuda.event()
            self._memory.append(cuda.memory(max(1, layers_bytes)))
            context.set_device_memory(self._memory[0], layers_bytes)
            self._input = self._buffers("pixels", shape, np.dtype(np.uint8))
            self._outputs = [
                self._buffers(name, (widths[name],), kind) for name, kind in OUTPUTS.items()
            ]
            self.pixels: Pixels = self._input.rows
            for size in sizes:
                self._graphs[size] = self._prepare(size)
            self._waiter = threading.Thread(target=self._attend, name="tensorrt", daemon=True)
            self._waiter.start()
        except BaseException:
            self.close()
            raise

    def start(self, rows: int, done: OnDone) -> None:
        size = padded_size(rows, self._sizes)
        failed: Exception | None = None
        try:
            graph = self._graphs[size]
            if graph is None:
                self._shape(size)
                self._enqueue(size)
            else:
                self._cuda.launch(graph, self._stream)
            self._cuda.record(self._event, self._stream)
        except (CudaError, EngineFailure) as error:
            failed = error
        self._jobs.put((rows, done, failed))

    @property
    def captured(self) -> list[int]:
        """The batch sizes that are one launch."""
        return [size for size, graph in self._graphs.items() if graph is not None]

    def close(self) -> None:
        """Frees everything; safe to call twice, and halfway through making it."""
        if self._waiter is not None:
            self._jobs.put(None)
            self._waiter.join()
            self._waiter = None
        cuda, self.pixels = self._cuda, np.empty((0, 0, 0, 0), np.uint8)
        self._input = self._outputs = None  # type: ignore[assignment]
        self._context = None
        graphs = [graph for graph in self._graphs.values() if graph]
        for free, handles in (
            (cuda.free_graph, graphs),
            (cuda.free_event, [self._event]),
            (cuda.free_stream, [self._stream]),
            (cuda.free, self._memory),
            (cuda.free_pinned, self._pinned),
        ):
            for handle in handles:
                with suppress(CudaError):  # of a device that is lost
                    if handle:
                        free(handle)
        self._graphs, self._memory, self._pinned = {}, [], []
        self._stream = self._event = 0

    def _attend(self) -> None:
        """The waiting thread: gives out each batch once its event has happened.

        One that failed at its start is given out when nothing of it runs any more; a device that
        is lost says so then, where TensorRT did not.
        """
        while (job := self._jobs.get()) is not None:
            rows, done, failed = job
            outcome: Outputs | Exception
            try:
                if failed is not None:
                    self._cuda.finish(self._stream)
                    raise failed
                self._cuda.wait(self._event)
                outcome = Outputs(*(buffers.rows[:rows].copy() for buffers in self._outputs))
            except CudaError as error:
                outcome = _failure(error, f"CUDA: {error}")
            except EngineFailure as error:
                outcome = error
            done(outcome)

    def _buffers(self, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> Buffers:
        row_bytes = math.prod(shape) * kind.itemsize
        size = self._sizes[-1] * row_bytes
        host, content = self._cuda.pinned(size)
        self._pinned.append(host)
        content[:] = 0
        device = self._cuda.memory(size)
        self._memory.append(device)
        if not self._context.set_tensor_address(name, device):
            raise EngineFailure(f"TensorRT takes no memory for {name}")
        return Buffers(name, device, host, content.view(kind).reshape(-1, *shape), row_bytes)

    def _prepare(self, size: int) -> int | None:
        """A graph of one batch size, after a run that compiles what the size needs; None where it
        can't be captured."""
        self._shape(size)
        try:
            self._enqueue(size)
        finally:
            self._cuda.finish(self._stream)  # knows of a lost device, where TensorRT just fails
        capturable = getattr(self._context, "is_stream_capturable", None)
        why = "TensorRT says so"
        if capturable is None or capturable(self._stream):
            try:
                return self._captured(size)
            except CudaError as error:
                if error.sticky:
                    raise
                why = str(error)
            except EngineFailure as error:
                why = str(error)
        log.warning("graph_not_captured", extra={"rows": size, "reason": why})
        return None  # batches of the size are enqueued each time, which costs the processor more

    def _captured(self, size: int) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue(size)
        except BaseException:
            with suppress(CudaError):  # the stream must not be left capturing
                self._cuda.free_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)

    def _shape(self, size: int) -> None:
        if not self._context.set_input_shape(self._input.name, (size, *self.pixels.shape[1:])):
            raise EngineFailure(f"TensorRT takes no batch of {size}")

    def _enqueue(self, size: int) -> None:
        cuda, stream, pixels = self._cuda, self._stream, self._input
        cuda.copy_in(pixels.device, pixels.host, size * pixels.row_bytes, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineFailure(f"TensorRT could not run a batch of {size}")
        for output in self._outputs:
            cuda.copy_out(output.host, output.device, size * output.row_bytes, stream)


class TensorRtEngine:
    """A plan on the GPU; `keep` is what must live as long as its contexts."""

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


def _failure(error: CudaError, message: str) -> EngineFailure:
    return DeviceLost(message) if error.sticky else EngineFailure(message)


# --- the libraries -----------------------------------------------------------------------------


def _library(variant: str) -> Any:
    """TensorRT's module. Raises ImportError, of shared libraries that can't be loaded too."""
    try:
        if variant == "tensorrt":
            import tensorrt

            return tensorrt
        if variant == "rtx":
            import tensorrt_rtx_libs  # noqa: F401, I001 (first: it loads what the bindings link to)
            import tensorrt_rtx_bindings

            return tensorrt_rtx_bindings
    except OSError as error:
        raise ImportError(str(error)) from error
    raise ImportError(f"TensorRT's variant {variant!r} is unknown; there are {', '.join(NAMES)}")


def _installed(variant: str) -> str:
    """The variant asked for, or of "auto" the one for datacenters before the other.

    Raises ImportError, with what to install.
    """
    for candidate in NAMES if variant == "auto" else (variant,):
        try:
            _library(candidate)
        except ImportError:
            continue
        return candidate
    wanted = "neither TensorRT nor TensorRT-RTX" if variant == "auto" else f"no {NAMES[variant]}"
    extra = "gpu-datacenter" if variant == "tensorrt" else "gpu"
    raise ImportError(f"{wanted} is installed: pip install 'convserve[{extra}]'")


def _gpu_or_none() -> Gpu | None:
    try:
        return Cuda().gpu()
    except (Absent, CudaError):
        return None


def _capabilities(trt: Any, variant: str, asked: Sequence[str], gpu: Gpu | None) -> tuple[str, ...]:
    """What to compile for, as "sm89". Raises EngineFailure."""
    if variant == "tensorrt":
        if gpu is None:
            raise EngineFailure(
                "TensorRT compiles on the GPU that is to run the engine, and there is none here; "
                "--tensorrt-variant rtx compiles without"
            )
        if asked and set(map(_sm, asked)) != {gpu.capability}:
            raise EngineFailure(
                f"TensorRT compiles for the GPU here alone, which is {gpu.capability}"
            )
        return (gpu.capability,)
    known = _known(trt)
    if asked:
        names = tuple(sorted(set(map(_sm, asked)), key=lambda name: (len(name), name)))
        if unknown := [name for name in names if name not in known]:
            raise EngineFailure(
                f"TensorRT-RTX {trt.__version__} has no compute capability {', '.join(unknown)}; "
                f"it has {', '.join(known)}"
            )
        return names
    if gpu is not None:
        return (gpu.capability,)
    return tuple(name for name in PORTABLE if name in known)


def _known(trt: Any) -> list[str]:
    """The capabilities that TensorRT-RTX can name, in order."""
    numbers = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"sm{number}" for number in sorted(numbers, key=int)]


def _span(trt: Any, names: Sequence[str]) -> str:
    """In a file's name: "sm89", or the ends of a row without gaps, "sm80-121"."""
    if len(names) > 2 and list(names) == [
        name for name in _known(trt) if _number(names[0]) <= _number(name) <= _number(names[-1])
    ]:
        names = (names[0], names[-1])
    return "-".join([names[0], *(name.removeprefix("sm") for name in names[1:])])


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm"))


def _sm(text: str) -> str:
    """ "8.9", "89" and "sm89" are the same."""
    return f"sm{text.lower().removeprefix('sm').replace('.', '').replace('_', '')}"


def _dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _notes(trt: Any) -> Any:
    """The library's logger, which keeps the last errors from now on, to be told where something
    fails."""
    notes = _logger(trt)
    notes.errors.clear()
    return notes


@cache
def _logger(trt: Any) -> Any:
    """One for good: TensorRT keeps the first that it is given, and writes to it ever after."""

    class Notes(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            log.debug("tensorrt", extra={"severity": severity.name, "text": message})

        def last(self) -> str:
            return "; ".join(self.errors) or "it does not say why"

    return Notes()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Tells `progress` of the outermost phase, whose steps are the whole of the work."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(step + 1, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _complaints(parser: Any) -> str:
    """What the parser does not take, by node, and what to change; empty where it names none."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return ""
    told = "; ".join(
        f"node {error.node_name() or error.node()} ({error.node_operator() or 'graph'}): "
        f"{error.desc()}"
        for error in errors[:3]
    )
    return f"{told}. Change that layer in its architecture, or how model_repo/export.py writes it"


def _widths(network: Any, name: str) -> dict[str, int]:
    """How many numbers a row of each output has. Raises EngineFailure for an alien plan."""
    try:
        shapes = {output: tuple(network.get_tensor_shape(output)) for output in OUTPUTS}
        return {output: int(shape[1]) for output, shape in shapes.items()}
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise EngineFailure(f"{name} has no outputs {', '.join(OUTPUTS)}: {error}") from error


def _contexts(trt: Any, network: Any, name: str) -> tuple[list[Any], Any]:
    """An execution context an instance, to be given memory for its layers by who uses it, and what
    must live as long as they."""
    how, kernels = trt.ExecutionContextAllocationStrategy.USER_MANAGED, None
    if hasattr(trt, "CudaGraphStrategy"):  # TensorRT-RTX; what it does by itself is turned off
        config = network.create_runtime_config()
        config.set_execution_context_allocation_strategy(how)
        # A graph keeps the kernels it was captured with, so those for the size must be there then.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture ourselves
        kernels = config.create_runtime_cache()  # what one context compiles, the others find
        config.set_runtime_cache(kernels)
        how = config
    contexts = [network.create_execution_context(how) for _ in range(INSTANCES)]
    if any(context is None for context in contexts):
        raise EngineFailure(f"TensorRT can't make a context of {name}")
    return contexts, (kernels, how)


class _TimingCache:
    """Keeps what was measured of kernels from one compilation to the next, by version and GPU.

    TensorRT-RTX measures nothing, and asks for a GPU where it is given such a cache.
    """

    def __init__(
        self, trt: Any, config: Any, variant: str, gpu: Gpu | None, folder: Path | None
    ) -> None:
        self._config = config
        self._path: Path | None = None
        if variant == "tensorrt" and gpu is not None and folder is not None:
            self._path = folder / f"tensorrt-{trt.__version__}-{gpu.capability}.timing"

    def __enter__(self) -> None:
        if self._path is None:
            return
        kept = self._path.read_bytes() if self._path.is_file() else b""
        if not self._use(kept):
            self._use(b"")  # what was kept is damaged, or another GPU's: begin anew

    def __exit__(self, *_: object) -> None:
        if self._path is None or (cache := self._config.get_timing_cache()) is None:
            return
        with suppress(OSError):  # it would have been faster next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_bytes(cache.serialize())
            new.replace(self._path)

    def _use(self, content: bytes) -> bool:
        cache = self._config.create_timing_cache(content)
        return cache is not None and bool(self._config.set_timing_cache(cache, False))
