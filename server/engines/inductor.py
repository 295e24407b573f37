"""PyTorch's own compiler ahead of time (AOTInductor): for GPUs that no TensorRT at hand serves.

It needs torch where it serves, so it is an extra of its own and never chosen where TensorRT works,
on a CPU not before OpenVINO. It runs on the CPU too, which makes it an independent check of the
others.

On a GPU a batch is the replay of a CUDA graph, one a size; a thread of the instance waits for its
event. On the CPU that thread computes.
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
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from server.repository.manifest import EngineRecord

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16")
INSTANCES = 2  # on a GPU: one is copied while the other computes

# Of a GPU: convolutions of one pixel become products of matrices in Triton's kernels, with bias,
# residual and ReLU inside, where cuDNN's leave each to a pass of its own over the memory: 33 of
# ResNet-50's 53. Without the last line nothing is fused (torch 2.11).
FUSED: dict[str, Any] = {
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "TRITON",
    "max_autotune_conv_backends": "ATEN",
    "benchmark_epilogue_fusion": False,
    "loop_ordering_after_fusion": False,
}
FUSED_APART = 0.02  # of a probability: so far two ways of rounding to halves may lie apart

torch.backends.cudnn.allow_tf32 = False  # what is left in float32 is so for its digits


def version() -> str:
    return str(torch.__version__)


def hardware() -> str:
    """ "cuda sm90", or "cpu x86_64 AVX512"."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"cuda sm{major}{minor}"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def best_precision() -> str:
    return "bf16"


def precisions() -> Sequence[str]:
    return PRECISIONS


def compile(
    onnx: Path, folder: Path, target: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Compiles the network itself, not the graph. Needs a C++ compiler. Raises EngineFailure.

    On a GPU a network with pointwise convolutions is compiled in two ways, and what is faster here
    is kept.
    """
    if target.program is None:
        raise EngineFailure(
            "inductor compiles the network itself, which a published version has no more; "
            "build a new version, without --add-engine"
        )
    if target.hardware:
        raise EngineFailure("inductor compiles for this machine alone")
    where = hardware()
    name = f"inductor-{target.precision}-{where.split()[1]}-torch{version().partition('+')[0]}"
    path = folder / f"{name}.pt2"
    device = where.split()[0]
    rows = max(2, target.opt_batch)  # of one row, the 1 would become a constant
    program = partial(target.program, target.precision, device, rows)
    try:
        _package(program(), path, {})
    except Exception as error:  # of a compiler with very many ways to fail
        raise EngineFailure(f"inductor can't compile {onnx.name}: {_first_line(error)}") from error
    if device == "cuda":
        _take_fused(program, path)
    return CompiledEngine(name, [path.name], where, version())


def _package(program: torch.export.ExportedProgram, path: Path, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of its own future
        with torch.no_grad():  # or freezing is passed over
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"freezing": True, **options}
            )


def _take_fused(program: Callable[[], torch.export.ExportedProgram], path: Path) -> None:
    """Puts in place of a package one with FUSED where that can be made, is right and is faster."""
    other = path.with_suffix(".fused.pt2")
    try:
        fused = program()
        if not _has_pointwise_convolutions(fused):
            return
        _package(fused, other, FUSED)
        draw = torch.Generator().manual_seed(0)
        size = fused.example_inputs[0][0].shape
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw).to("cuda")
        (plain_s, usual), (fused_s, found) = (_timed(each, pixels) for each in (path, other))
        apart = float((usual - found).abs().max())
        log.info(
            "compiled_twice",
            extra={"rows": len(pixels), "plain_s": plain_s, "fused_s": fused_s, "apart": apart},
        )
        if apart <= FUSED_APART and fused_s < plain_s:
            other.replace(path)
    except Exception as error:  # then it stays as it is, which works
        log.warning("not_fused", extra={"reason": _first_line(error)})
    finally:
        other.unlink(missing_ok=True)
        _empty_cache()


def _has_pointwise_convolutions(program: torch.export.ExportedProgram) -> bool:
    """Whether some convolutions are products of matrices: of one pixel, and of stride 1."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.conv2d.default:
            weight, *more = node.args[1:]  # and bias, stride, padding, ... where they are not usual
            kernel = tuple(weight.meta["val"].shape[2:])
            if kernel == (1, 1) and set(more[1] if len(more) > 1 else (1,)) == {1}:
                return True
    return False


def _timed(path: Path, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds of a batch on the GPU, the median of ten, and its probabilities."""
    network = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    seconds = []
    with torch.inference_mode():
        for number in range(13):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record()
            probabilities = network(pixels)[2]
            ended.record()
            ended.synchronize()
            if number >= 3:  # the first ones make kernels and workspaces ready
                seconds.append(begun.elapsed_time(ended) / 1e3)
    return sorted(seconds)[len(seconds) // 2], probabilities.float().cpu()


def incompatibility(record: EngineRecord) -> str | None:
    if record.backend_version != version():
        return (
            f"it was compiled by torch {record.backend_version} and this is {version()}; "
            "build it again, or install that version"
        )
    if record.hardware != hardware():
        return f"it was compiled for {record.hardware} and this is {hardware()}; build it here"
    if record.precision not in PRECISIONS:
        return f"precision {record.precision!r} is unknown; there are {', '.join(PRECISIONS)}"
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> InductorEngine:
    name = record.files[0].name
    try:
        # What guards a network against several threads asks for events, which no capture allows.
        network = torch._inductor.aoti_load_package(
            str(folder / name), run_single_threaded=_on_gpu(record)
        )
        return InductorEngine(network, record, shape, threads)
    except Exception as error:  # zip, JSON, the dynamic linker, and torch's own
        traceback.clear_frames(error.__traceback__)  # they hold memory of the device
        _empty_cache()
        raise _failure(error, f"inductor can't load {name}") from error


class _Instance:
    """Runs what it is given on a thread of its own, which starts when all else is made."""

    def __init__(self, pixels: torch.Tensor, units: int) -> None:
        self.pixels: Pixels = pixels.numpy()
        self.units = units
        self._jobs: SimpleQueue[tuple[int, OnDone] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._attend, name="inductor", daemon=True)
        self._thread.start()

    def start(self, rows: int, done: OnDone) -> None:
        self._jobs.put((rows, done))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _attend(self) -> None:
        while (job := self._jobs.get()) is not None:
            rows, done = job
            try:
                outcome: Outputs | Exception = self._run(rows)
            except Exception as error:
                outcome = _failure(error, "inductor")
            done(outcome)

    def _run(self, rows: int) -> Outputs:
        raise NotImplementedError


class CpuInstance(_Instance):
    """All cores, one batch at a time."""

    def __init__(self, network: Any, pixels: torch.Tensor, units: int) -> None:
        self._network = network
        self._input = pixels
        super().__init__(pixels, units)

    def _run(self, rows: int) -> Outputs:
        with torch.inference_mode():
            return Outputs(*(array.numpy() for array in self._network(self._input[:rows])))


class GpuInstance(_Instance):
    """A stream with a graph for each batch size; the memory of the largest serves all."""

    def __init__(self, network: Any, size: tuple[int, ...], sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._device = self._host.to("cuda")
        self._answers: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, Any] = {}
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            for rows in reversed(sizes):  # one at a time is replayed, so they may share what the
                self._graphs[rows] = self._captured(network, rows, pool)  # largest has taken
        super().__init__(self._host, 1)

    def close(self) -> None:
        super().close()
        self.pixels = np.empty((0, 0, 0, 0), np.uint8)
        self._graphs, self._answers = {}, []
        self._host = self._device = torch.empty(0)

    def _captured(self, network: Any, size: int, pool: Any) -> Any:
        """A graph that copies in, computes and copies out."""
        rows, host = self._device[:size], self._host[:size]
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels and workspaces are made ready by the first runs
                outputs = network(rows)
        self._stream.synchronize()
        if not self._answers:
            self._answers = [torch.empty(a.shape, dtype=a.dtype, pin_memory=True) for a in outputs]
        del outputs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            rows.copy_(host, non_blocking=True)
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
    """A compiled network, on the GPU where it was compiled for one."""

    def __init__(
        self, network: Any, record: EngineRecord, shape: tuple[int, int, int], threads: int
    ) -> None:
        self.max_batch = record.max_batch
        on_gpu = _on_gpu(record)
        self.device = "gpu" if on_gpu else "cpu"
        self.units = INSTANCES if on_gpu else threads
        self._network = network  # the graphs read its weights
        self._sizes = graph_sizes(record) if on_gpu else []
        self.instances: list[_Instance] = []
        size = (self.max_batch, *shape)
        if not on_gpu:
            torch.set_num_threads(threads)
            pixels = torch.zeros(size, dtype=torch.uint8)
            self.instances.append(CpuInstance(network, pixels, threads))
            return
        try:
            for _ in range(INSTANCES):
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
    """Gives memory that torch would keep for itself to the driver, which is who TensorRT asks."""
    with suppress(torch.AcceleratorError):  # of a device that is lost
        torch.cuda.empty_cache()


def _on_gpu(record: EngineRecord) -> bool:
    return record.hardware.startswith("cuda")


def _failure(error: Exception, what: str) -> EngineFailure:
    message = f"{what}: {_first_line(error)}"
    if isinstance(error, torch.AcceleratorError):
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:  # it comes back whatever is asked: the device is lost
            return DeviceLost(message)
    return EngineFailure(message)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
