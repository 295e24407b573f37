"""PyTorch's own compiler ahead of time (AOTInductor): for GPUs that no TensorRT at hand serves.

It needs torch where it serves, so it is an extra of its own and never chosen where TensorRT works,
on a CPU not before OpenVINO. It runs on the CPU too, which makes it an independent check of the
others.

On a GPU a batch is the replay of a CUDA graph, one a size; a thread of the instance waits for its
event. On the CPU that thread computes.
"""

from __future__ import annotations

import platform
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor

from server.engines import (
    Compiled,
    Done,
    Outputs,
    Pixels,
    Progress,
    Target,
    quietly,
    size_for,
    sizes_of,
)
from server.errors import DeviceLost, EngineFailure

if TYPE_CHECKING:
    from server.repository import EngineRecord

PRECISIONS = ("fp32", "bf16", "fp16")
INSTANCES = 2  # on a GPU: one is copied while the other computes


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


def compile(onnx: Path, folder: Path, target: Target, progress: Progress = quietly) -> Compiled:
    """Compiles the network itself, not the graph. Needs a C++ compiler. Raises EngineFailure."""
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of its own future
            program = target.program(target.precision, where.split()[0])
            with torch.no_grad():  # or the next line's option is passed over
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs={"freezing": True}
                )
    except Exception as error:  # of a compiler with very many ways to fail
        reason = str(error).strip().partition("\n")[0]
        raise EngineFailure(f"inductor can't compile {onnx.name}: {reason}") from error
    return Compiled(name, [path.name], where, version())


def unfit(record: EngineRecord) -> str | None:
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
        network = torch._inductor.aoti_load_package(str(folder / name))
        return InductorEngine(network, record, shape, threads)
    except Exception as error:  # zip, JSON, the dynamic linker, and torch's own
        reason = str(error).strip().partition("\n")[0]
        raise EngineFailure(f"inductor can't load {name}: {reason}") from error


class _Instance:
    """Runs what it is given on a thread of its own."""

    def __init__(self, pixels: torch.Tensor, units: int) -> None:
        self.pixels: Pixels = pixels.numpy()
        self.units = units
        self._jobs: SimpleQueue[tuple[int, Done] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._attend, name="inductor", daemon=True)
        self._thread.start()

    def start(self, rows: int, done: Done) -> None:
        self._jobs.put((rows, done))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _attend(self) -> None:
        while (job := self._jobs.get()) is not None:
            rows, done = job
            try:
                outcome: Outputs | Exception = self._run(rows)
            except torch.AcceleratorError as error:  # CUDA's; torch can't go on after one
                outcome = DeviceLost(f"inductor: {str(error).partition(chr(10))[0]}")
            except Exception as error:
                outcome = EngineFailure(f"inductor: {error}")
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

    def __init__(self, network: Any, pixels: torch.Tensor, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._host = pixels
        self._device = pixels.to("cuda")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._graphs: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        with torch.inference_mode():
            for size in sizes:
                self._graphs[size] = self._captured(network, size)
        super().__init__(pixels, 1)

    def _captured(self, network: Any, size: int) -> tuple[Any, list[torch.Tensor]]:
        """A graph that copies in, computes and copies out, with the host's tensors it fills."""
        rows, host = self._device[:size], self._host[:size]
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels and workspaces are made ready by the first runs
                outputs = network(rows)
        self._stream.synchronize()
        answers = [torch.empty(a.shape, dtype=a.dtype, pin_memory=True) for a in outputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            rows.copy_(host, non_blocking=True)
            for answer, output in zip(answers, network(rows), strict=True):
                answer.copy_(output, non_blocking=True)
        return graph, answers

    def _run(self, rows: int) -> Outputs:
        size = size_for(rows, self._sizes)
        graph, answers = self._graphs[size]
        with torch.cuda.stream(self._stream):
            graph.replay()
            self._event.record(self._stream)
        self._event.synchronize()
        return Outputs(*(answer[:rows].numpy().copy() for answer in answers))


class InductorEngine:
    """A compiled network, on the GPU where it was compiled for one."""

    def __init__(
        self, network: Any, record: EngineRecord, shape: tuple[int, int, int], threads: int
    ) -> None:
        self.max_batch = record.max_batch
        on_gpu = record.hardware.startswith("cuda")
        self.device = "gpu" if on_gpu else "cpu"
        self.units = INSTANCES if on_gpu else threads
        self._sizes = sizes_of(record) if on_gpu else []
        self.instances: Sequence[_Instance] = []
        size = (self.max_batch, *shape)
        if on_gpu:
            self.instances = [
                GpuInstance(
                    network, torch.zeros(size, dtype=torch.uint8, pin_memory=True), self._sizes
                )
                for _ in range(INSTANCES)
            ]
        else:
            torch.set_num_threads(threads)
            self.instances = [CpuInstance(network, torch.zeros(size, dtype=torch.uint8), threads)]

    def computed(self, rows: int) -> int:
        return size_for(rows, self._sizes) if self._sizes else rows

    def close(self) -> None:
        instances, self.instances = self.instances, []
        for instance in instances:
            instance.close()
