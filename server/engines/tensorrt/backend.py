"""The TensorRT backend: compiles, checks and loads plans for NVIDIA GPUs.

It supports both variants of libraries.py. TensorRT-RTX compiles without a GPU; machine code is
generated when the plan is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.engines.base import CompiledEngine, CompileOptions, Progress, ignore_progress
from server.engines.tensorrt.builder import build_plan
from server.engines.tensorrt.capabilities import short_name, target_capabilities
from server.engines.tensorrt.cuda import Cuda, CudaError, Gpu, GpuUnavailable
from server.engines.tensorrt.libraries import (
    NAMES,
    fresh_logger,
    import_library,
    installed_variant,
)
from server.engines.tensorrt.runtime import (
    INSTANCES,
    TensorRtEngine,
    create_contexts,
    failure,
    output_widths,
)
from server.errors import EngineFailure
from server.repository.manifest import EngineRecord

PRECISIONS = ("fp32", "bf16", "fp16")

# Device memory that a plan needs beside its own size, at least: machine code and the CUDA context.
# The memory of its layers is known only after loading, see `load`.
MIN_EXTRA_BYTES = 512 << 20

BUILD_HERE = "python -m model_repo.build MODEL --add-engine --backend tensorrt"
ADVICE = f"compile an engine on this machine: {BUILD_HERE}"


def version() -> str:
    """Variant and exact version, for example "rtx 1.6.1.120". Raises ImportError."""
    variant = installed_variant("auto")
    return f"{variant} {import_library(variant).__version__}"


def hardware() -> str:
    """The GPU's compute capability, for example "sm90", or "none" without a GPU."""
    gpu = _gpu_or_none()
    return gpu.capability if gpu is not None else "none"


def best_precision() -> str:
    return "fp16"


def precisions() -> Sequence[str]:
    return PRECISIONS


def compile(
    onnx: Path, folder: Path, options: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Compiles for the GPU of this machine.

    TensorRT-RTX also compiles without a GPU, and for other compute capabilities ("sm89", "8.9").
    The graph is first converted to the precision, see server.engines.onnx_precision. Raises
    EngineFailure.
    """
    try:
        variant = installed_variant(options.variant)
    except ImportError as error:
        raise EngineFailure(str(error)) from None
    trt = import_library(variant)
    gpu = _gpu_or_none()
    capabilities = target_capabilities(trt, variant, options.hardware, gpu)
    plan = build_plan(trt, variant, onnx, options, capabilities, gpu, progress)
    release = f"{'rtx' if variant == 'rtx' else ''}{trt.__version__}"
    name = f"tensorrt-{options.precision}-{short_name(trt, capabilities)}-{release}"
    path = folder / f"{name}.plan"
    path.write_bytes(plan)
    return CompiledEngine(name, [path.name], " ".join(capabilities), f"{variant} {trt.__version__}")


def incompatibility(record: EngineRecord) -> str | None:
    try:
        gpu = Cuda().gpu()
    except (GpuUnavailable, CudaError) as error:
        return str(error)
    return _library_mismatch(record) or _gpu_mismatch(record, gpu)


def _library_mismatch(record: EngineRecord) -> str | None:
    """Why the installed libraries can't run the engine; None if they can."""
    variant, _, compiled_by = record.backend_version.partition(" ")
    if variant not in NAMES:
        return (
            f"it was compiled by {record.backend_version!r}, which this server does not support; "
            f"{ADVICE}"
        )
    try:
        installed = str(import_library(variant).__version__)
    except ImportError:
        return (
            f"it needs {NAMES[variant]} {compiled_by}, which is not installed; install it, or "
            f"{ADVICE}"
        )
    if installed != compiled_by:
        return (
            f"it was compiled by {NAMES[variant]} {compiled_by}, but {installed} is installed; "
            f"{ADVICE}"
        )
    return None


def _gpu_mismatch(record: EngineRecord, gpu: Gpu) -> str | None:
    """Why the driver or the GPU can't run the engine; None if they can."""
    if gpu.driver_cuda < gpu.required_cuda:
        return (
            f"the NVIDIA driver supports CUDA {_dotted(gpu.driver_cuda)}, but the installed "
            f"libraries need {_dotted(gpu.required_cuda)}; install a newer driver"
        )
    if gpu.capability not in record.hardware.split():
        return (
            f"it was compiled for {record.hardware.replace(' ', ', ')}, but this GPU, {gpu.name}, "
            f"is {gpu.capability}; {ADVICE}"
        )
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; TensorRT has {', '.join(PRECISIONS)}"
    needed = sum(file.bytes for file in record.files) + MIN_EXTRA_BYTES
    if gpu.free_bytes < needed:
        return (
            f"it needs about {needed >> 20:,} MiB of GPU memory, but {gpu.free_bytes >> 20:,} MiB "
            "are free; serve fewer models, or stop other programs on the GPU"
        )
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> TensorRtEngine:
    name = record.files[0].name
    try:
        trt = import_library(record.backend_version.partition(" ")[0])
        plan = (folder / name).read_bytes()
        cuda = Cuda()
    except (ImportError, OSError, GpuUnavailable, CudaError) as error:
        raise EngineFailure(f"TensorRT can't load {name}: {error}") from error
    logger = fresh_logger(trt)
    runtime = trt.Runtime(logger)
    try:
        network = runtime.deserialize_cuda_engine(plan)
        free_bytes = cuda.gpu().free_bytes
        if network is None:
            raise EngineFailure(f"TensorRT can't load {name}: {logger.last_errors()}")
        layers_bytes = network.device_memory_size_v2
        if free_bytes < INSTANCES * layers_bytes:
            raise EngineFailure(
                f"{name} needs {INSTANCES * layers_bytes >> 20:,} MiB of GPU memory for its "
                f"layers, but {free_bytes >> 20:,} MiB are free; serve fewer models, or build it "
                "with a smaller --max-batch"
            )
        contexts, kept = create_contexts(trt, network, name)
        return TensorRtEngine(
            cuda,
            contexts,
            record,
            shape,
            output_widths(network, name),
            layers_bytes,
            keep=(logger, runtime, network, kept),  # freed from the last to the first
        )
    except CudaError as error:
        reason = "; ".join([str(error), *logger.errors])
        raise failure(error, f"TensorRT can't load {name}: {reason}") from error


def _gpu_or_none() -> Gpu | None:
    try:
        return Cuda().gpu()
    except (GpuUnavailable, CudaError):
        return None


def _dotted(cuda: int) -> str:
    """13020 -> "13.2"."""
    return f"{cuda // 1000}.{cuda % 1000 // 10}"
