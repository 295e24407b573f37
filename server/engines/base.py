"""The engine interface: pixels in, classes out. Each backend is a file or folder beside this one.

`backend(name)` imports only the backend it returns. So a backend's library must be installed only
where that backend is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from server.images.input_spec import Pixels
from server.repository.manifest import EngineRecord

BACKENDS = {  # name -> the module with its functions, see Backend
    "openvino": "server.engines.openvino",
    "tensorrt": "server.engines.tensorrt.backend",
    "inductor": "server.engines.inductor",
    "null": "server.engines.null",
}


class Outputs(NamedTuple):
    """The results of N rows; K is the manifest's top_k. The receiver may keep the arrays."""

    classes: NDArray[np.int32]  # [N, K], best first
    scores: NDArray[np.float32]  # [N, K], the probabilities of these classes
    probabilities: NDArray[np.float32]  # [N, classes]

    def rows(self, first: int, end: int) -> Outputs:
        """A view of the rows from `first` up to `end`."""
        return Outputs(
            self.classes[first:end], self.scores[first:end], self.probabilities[first:end]
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Outputs]) -> Outputs:
        """All rows of the parts, in order."""
        return cls(
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
        )


class RowSource(ABC):
    """Rows [N, H, W, C] stored elsewhere, for example in shared memory.

    They are copied once, straight into the batch.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def copy_into(self, target: Pixels, first: int) -> None:
        """Fills `target` with the rows that start at `first`.

        Raises InvalidInput if the rows no longer exist.
        """


OnDone = Callable[["Outputs | Exception"], None]
Progress = Callable[[int, "int | None"], None]  # steps done, and the total if it is known


class CompileOptions(NamedTuple):
    """How to compile a network, and for which machine."""

    precision: str
    max_batch: int
    opt_batch: int = 0  # the batch size to optimise for; 0 means max_batch
    min_batch: int = 1  # smaller batches are padded to this size
    hardware: tuple[str, ...] = ()  # features of other machines; empty means this machine
    variant: str = "auto"  # for backends that support several libraries
    cache: Path | None = None  # a folder for data that makes the next compilation faster
    # For backends that compile the PyTorch program instead of the ONNX graph: returns the traced
    # network for a precision, a device ("cpu" or "cuda") and a batch size to optimise for. None
    # if only the graph is available.
    program: Callable[[str, str, int], Any] | None = None
    # For precision "int8": quantises the backend's own form of the network. None if there are no
    # images to calibrate it with.
    quantize: Callable[[Any], Any] | None = None


class CompiledEngine(NamedTuple):
    """The result of a compilation."""

    name: str  # unique among the engines of one network
    files: list[str]  # names in the output folder, the main file first
    hardware: str  # the features it needs, as the manifest records them
    version: str  # of the library that compiled it


class Instance(Protocol):
    """Runs one batch at a time, with its own input memory and a share of the device.

    The owner writes rows into `pixels` and calls `start`. It then leaves the instance alone until
    `on_done` is called.
    """

    pixels: Pixels  # [max_batch, H, W, C]
    units: int  # how many of the device's units it occupies while it runs

    def start(self, rows: int, on_done: OnDone) -> None:
        """Starts a batch of the first `rows` rows of `pixels`, 1 <= rows <= max_batch.

        Returns at once. `on_done` is called exactly once, with the outputs or an EngineFailure. The
        call may come from a backend thread, and may come before `start` returns. After a failure
        the instance is still usable, unless the engine was closed.
        """


class Engine(Protocol):
    """A loaded network with one or more instances.

    Rows are independent: the result of a row depends neither on other rows nor on its position.
    Instances may run at the same time as long as the device has enough units for them.
    """

    max_batch: int
    device: str  # engines on the same device share its units
    units: int  # how many units the device has
    instances: Sequence[Instance]

    def computed_rows(self, rows: int) -> int:
        """How many rows the device computes for a batch of `rows`; more if the batch is padded."""

    def close(self) -> None:
        """Frees memory and threads. No batch may be running. Safe to call twice."""


class Backend(Protocol):
    """The functions that each backend's module defines."""

    def version(self) -> str:
        """The exact version of the library, as the manifest records it."""

    def hardware(self) -> str:
        """The features of this machine that engines depend on, e.g. "x86_64 amx_bf16"."""

    def best_precision(self) -> str:
        """The fastest precision that this machine supports natively."""

    def precisions(self) -> Sequence[str]:
        """The precisions that this machine can compile for."""

    def compile(
        self, onnx: Path, folder: Path, options: CompileOptions, progress: Progress = ...
    ) -> CompiledEngine:
        """Compiles an ONNX file into `folder`. Raises EngineFailure."""

    def incompatibility(self, record: EngineRecord) -> str | None:
        """Why this machine can't run the engine, and what to do. None if it can.

        Uses only the record, so it works before any file is read.
        """

    def load(
        self, folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
    ) -> Engine:
        """Loads a compiled engine for rows of `shape` (H, W, C). Raises EngineFailure.

        An engine on the CPU uses at most `threads` processor cores.
        """


def backend(name: str) -> Backend:
    """Imports and returns a backend.

    Raises ValueError for an unknown name, and ImportError if its library is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return cast(Backend, import_module(BACKENDS[name]))


def ignore_progress(done: int, total: int | None) -> None:
    """The default of `Backend.compile`: reports nothing."""


def infer(instance: Instance, pixels: Pixels) -> Outputs:
    """Runs [N, H, W, C] on one instance and waits for the result. Raises EngineFailure."""
    finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
    instance.pixels[: len(pixels)] = pixels
    instance.start(len(pixels), finished.put)
    outcome = finished.get()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def instances_by_units(engine: Engine) -> list[list[Instance]]:
    """The engine's instances, grouped by how many units of the device they occupy."""
    groups: dict[int, list[Instance]] = {}
    for instance in engine.instances:
        groups.setdefault(instance.units, []).append(instance)
    return list(groups.values())


def graph_sizes(record: EngineRecord) -> list[int]:
    """The batch sizes to capture a CUDA graph for, in ascending order.

    These are the powers of two within the engine's range, both ends of the range, and opt_batch.
    """
    smallest, largest = record.min_batch, record.max_batch
    sizes = {1 << power for power in range(largest.bit_length())} | {record.opt_batch}
    return sorted({size for size in sizes if smallest <= size <= largest} | {smallest, largest})


def padded_size(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `rows` rows."""
    return next(size for size in sizes if size >= rows)
