"""PyTorch's ahead-of-time compiler (AOTInductor): for GPUs that no available TensorRT supports.

It needs torch at serving time, so it is a separate extra. A server prefers TensorRT on a GPU and
OpenVINO on a CPU. It runs on the CPU too, and so serves as an independent check of other backends.

On a GPU a batch is one replay of a CUDA graph; there is one graph for each batch size. A thread of
the instance waits until the batch is complete. On a CPU that thread computes the batch.
"""

from __future__ import annotations

import logging
import platform
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch._inductor

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
from server.errors import DeviceLost, EngineFailure
from server.images.input_spec import Pixels
from server.repository.manifest import EngineRecord

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")
GPU_INSTANCES = 2  # one copies while the other computes

# Compiler options for GPUs. 1x1 convolutions become matrix products in Triton kernels that include
# bias, residual and ReLU. With cuDNN each of these is a separate pass over memory. In ResNet-50
# this applies to 33 of 53 convolutions. Without the last line nothing is fused (torch 2.11).
FUSED: dict[str, Any] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "max_autotune_conv_backends": "ATEN",
    "benchmark_epilogue_fusion": False,
    "loop_ordering_after_fusion": False,
}
MAX_FUSED_DIFFERENCE = 0.02  # of a probability; half precision rounds differently in the two ways

torch.backends.cudnn.allow_tf32 = False  # keep full precision where the network uses float32


def version() -> str:
    return str(torch.__version__)


def hardware() -> str:
    """For example "cuda sm90" or "cpu x86_64 AVX512"."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda sm{major}{minor}"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def best_precision() -> str:
    return "bf16"


def precisions() -> Sequence[str]:
    return PRECISIONS


def compile(
    onnx: Path, folder: Path, options: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Compiles the PyTorch program, not the ONNX graph. Needs a C++ compiler.

    On a GPU, a network with 1x1 convolutions is compiled in two ways, and the package that is
    faster on this GPU is kept. Raises EngineFailure.
    """
    if options.program is None:
        raise EngineFailure(
            "inductor needs the PyTorch network, which a published version does not contain; "
            "build a new version, without --add-engine"
        )
    if options.hardware:
        raise EngineFailure(
            "inductor compiles for this machine only; "
            f"remove the hardware {', '.join(options.hardware)}"
        )
    where = hardware()
    name = f"inductor-{options.precision}-{where.split()[1]}-torch{version().partition('+')[0]}"
    path = folder / f"{name}.pt2"
    device = where.split()[0]
    rows = max(2, options.opt_batch)  # with 1 row, torch would compile the 1 in as a constant
    program = partial(options.program, options.precision, device, rows)
    try:
        _package(program(), path, {})
    except Exception as error:  # the compiler raises many kinds
        raise EngineFailure(f"inductor can't compile {onnx.name}: {_first_line(error)}") from error
    if device == "cuda":
        _keep_faster(program, path)
    return CompiledEngine(name, [path.name], where, version())


def _package(program: torch.export.ExportedProgram, path: Path, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside torch
        with torch.no_grad():  # otherwise torch skips freezing
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"freezing": True, **options}
            )


def _keep_faster(program: Callable[[], torch.export.ExportedProgram], path: Path) -> None:
    """Compiles a second package with FUSED. Keeps it if it is correct and faster than the first."""
    other = path.with_suffix(".fused.pt2")
    try:
        fused = program()
        if not _has_pointwise_convolutions(fused):
            return
        _package(fused, other, FUSED)
        random = torch.Generator().manual_seed(0)
        size = fused.example_inputs[0][0].shape
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=random).to("cuda")
        (plain_s, plain_answer), (fused_s, fused_answer) = (
            _run_timed(each, pixels) for each in (path, other)
        )
        difference = float((plain_answer - fused_answer).abs().max())
        log.info(
            "fusion_measured",
            extra={
                "rows": len(pixels),
                "plain_s": plain_s,
                "fused_s": fused_s,
                "difference": difference,
            },
        )
        if difference <= MAX_FUSED_DIFFERENCE and fused_s < plain_s:
            other.replace(path)
    except Exception as error:  # the first package still works
        log.warning("fusion_failed", extra={"reason": _first_line(error)})
    finally:
        other.unlink(missing_ok=True)
        _empty_cache()


def _has_pointwise_convolutions(program: torch.export.ExportedProgram) -> bool:
    """Whether there are 1x1 convolutions of stride 1, which are matrix products."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.conv2d.default:
            # After the weight come bias, stride, padding, ...; trailing defaults are left out.
            weight, *more = node.args[1:]
            kernel = tuple(weight.meta["val"].shape[2:])
            if kernel == (1, 1) and set(more[1] if len(more) > 1 else (1,)) == {1}:
                return True
    return False


def _run_timed(path: Path, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The median seconds of ten batches on the GPU, and the probabilities."""
    network = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    seconds = []
    with torch.inference_mode():
        for number in range(13):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            probabilities = network(pixels)[2]
            end.record()
            end.synchronize()
            if number >= 3:  # the first runs are warm-up
                seconds.append(begin.elapsed_time(end) / 1e3)
    return sorted(seconds)[len(seconds) // 2], probabilities.float().cpu()


def incompatibility(record: EngineRecord) -> str | None:
    if record.backend_version != version():
        return (
            f"it was compiled by torch {record.backend_version}, but {version()} is installed; "
            "build it again, or install that version"
        )
    if record.hardware != hardware():
        return (
            f"it was compiled for {record.hardware}, but this machine has {hardware()}; "
            "build it on this machine"
        )
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; inductor has {', '.join(PRECISIONS)}"
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> InductorEngine:
    name = record.files[0].name
    try:
        # The multi-threaded mode queries events, which is not allowed during a graph capture.
        network = torch._inductor.aoti_load_package(
            str(folder / name), run_single_threaded=_on_gpu(record)
        )
        return InductorEngine(network, record, shape, threads)
    except Exception as error:  # from zip, JSON, the dynamic linker or torch
        traceback.clear_frames(error.__traceback__)  # the frames hold device memory
        _empty_cache()
        raise _failure(error, f"inductor can't load {name}") from error


class _Instance:
    """Runs batches on its own thread. The thread starts at the end of `__init__`."""

    def __init__(self, pixels: torch.Tensor, units: int) -> None:
        self.pixels: Pixels = pixels.numpy()
        self.units = units
        self._jobs: SimpleQueue[tuple[int, OnDone] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run_jobs, name="inductor", daemon=True)
        self._thread.start()

    def start(self, rows: int, on_done: OnDone) -> None:
        self._jobs.put((rows, on_done))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            rows, on_done = job
            try:
                outcome: Outputs | Exception = self._run(rows)
            except Exception as error:
                outcome = _failure(error, "inductor")
            on_done(outcome)

    def _run(self, rows: int) -> Outputs:
        raise NotImplementedError


class CpuInstance(_Instance):
    """Runs one batch at a time on all cores."""

    def __init__(self, network: Any, pixels: torch.Tensor, units: int) -> None:
        self._network = network
        self._input = pixels
        super().__init__(pixels, units)

    def _run(self, rows: int) -> Outputs:
        with torch.inference_mode():
            return Outputs(*(array.numpy() for array in self._network(self._input[:rows])))


class GpuInstance(_Instance):
    """A CUDA stream with one graph for each batch size. All graphs share the same memory."""

    def __init__(self, network: Any, size: tuple[int, ...], sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._host_input = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._device_input = self._host_input.to("cuda")
        self._answers: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, Any] = {}
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            # Only one graph runs at a time, so all can use the memory of the largest.
            for rows in reversed(sizes):
                self._graphs[rows] = self._capture(network, rows, pool)
        super().__init__(self._host_input, 1)

    def close(self) -> None:
        super().close()
        self.pixels = np.empty((0, 0, 0, 0), np.uint8)
        self._graphs, self._answers = {}, []
        self._host_input = self._device_input = torch.empty(0)

    def _capture(self, network: Any, size: int, pool: Any) -> Any:
        """A graph that copies the input in, computes, and copies the outputs back."""
        rows, host_rows = self._device_input[:size], self._host_input[:size]
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # the first runs prepare kernels and workspaces
                outputs = network(rows)
        self._stream.synchronize()
        if not self._answers:
            self._answers = [torch.empty(a.shape, dtype=a.dtype, pin_memory=True) for a in outputs]
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            rows.copy_(host_rows, non_blocking=True)
            for answer, output in zip(self._answers, network(rows), strict=True):
                answer[:size].copy_(output, non_blocking=True)
        return graph

    def _run(self, rows: int) -> Outputs:
        with torch.cuda.stream(self._stream):
            self._graphs[padded_size(rows, self._sizes)].replay()
            self._event.record(self._stream)
        self._event.synchronize()
        return Outputs(*(answer[:rows].numpy().copy() for answer in self._answers))


class InductorEngine:
    """A compiled network, on the GPU if it was compiled for one."""

    def __init__(
        self, network: Any, record: EngineRecord, shape: tuple[int, int, int], threads: int
    ) -> None:
        self.max_batch = record.max_batch
        on_gpu = _on_gpu(record)
        self.device = "gpu" if on_gpu else "cpu"
        self.units = GPU_INSTANCES if on_gpu else threads
        self._network = network  # kept because the graphs read its weights
        self._sizes = graph_sizes(record) if on_gpu else []
        self.instances: list[_Instance] = []
        size = (self.max_batch, *shape)
        if not on_gpu:
            torch.set_num_threads(threads)
            pixels = torch.zeros(size, dtype=torch.uint8)
            self.instances.append(CpuInstance(network, pixels, threads))
            return
        try:
            for _ in range(GPU_INSTANCES):
                self.instances.append(GpuInstance(network, size, self._sizes))
        except BaseException:
            self.close()
            raise

    def computed_rows(self, rows: int) -> int:
        return padded_size(rows, self._sizes) if self._sizes else rows

    def close(self) -> None:
        instances, self.instances = self.instances, []
        for instance in instances:
            instance.close()
        self._network = None
        _empty_cache()


def _empty_cache() -> None:
    """Returns the memory that torch caches to the driver, so that TensorRT can allocate it."""
    with suppress(torch.AcceleratorError):  # the device is lost
        torch.cuda.empty_cache()


def _on_gpu(record: EngineRecord) -> bool:
    return record.hardware.startswith("cuda")


def _failure(error: Exception, what: str) -> EngineFailure:
    message = f"{what}: {_first_line(error)}"
    if isinstance(error, torch.AcceleratorError):
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:  # every call fails from now on: the device is lost
            return DeviceLost(message)
    return EngineFailure(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
