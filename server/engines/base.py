"""What an engine is: pixels in, classes out. One file a backend stands beside this one.

The file's name is the backend's name: `backend("openvino")` imports `server.engines.openvino` and
nothing else, so a backend's library is needed only where that backend is chosen.
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

BACKENDS = ("openvino", "tensorrt", "inductor", "null")


class Outputs(NamedTuple):
    """What an engine says of N rows, K being min(10, classes). The receiver may keep the arrays."""

    classes: NDArray[np.int32]  # [N, K], best first
    scores: NDArray[np.float32]  # [N, K], their probabilities
    probabilities: NDArray[np.float32]  # [N, classes]

    def rows(self, first: int, end: int) -> Outputs:
        """A view of the rows from `first` up to `end`."""
        return Outputs(
            self.classes[first:end], self.scores[first:end], self.probabilities[first:end]
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Outputs]) -> Outputs:
        """All rows of the parts, in their order."""
        return cls(
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
        )


class RowSource(ABC):
    """[N, H, W, C] that stand elsewhere until a batch takes them, which is their only copy."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def copy_into(self, target: Pixels, first: int) -> None:
        """Fills the target with the rows from there on. Raises InvalidInput where they are gone."""


OnDone = Callable[["Outputs | Exception"], None]
Progress = Callable[[int, "int | None"], None]  # steps done, and of how many where that is known


class CompileOptions(NamedTuple):
    """What to compile a network for."""

    precision: str
    max_batch: int
    opt_batch: int = 0  # rows that it is tuned for; 0 is max_batch
    min_batch: int = 1  # fewer rows are filled up to these
    hardware: tuple[str, ...] = ()  # other machines' features; empty is this machine
    variant: str = "auto"  # of a backend that comes in several
    cache: Path | None = None  # a folder for what makes the next compilation faster
    # The traced network by precision, kind of device ("cpu", "cuda") and how many rows it is tuned
    # for, where it is at hand, for a backend that does not compile the graph.
    program: Callable[[str, str, int], Any] | None = None


class CompiledEngine(NamedTuple):
    """What became of it."""

    name: str  # of the engine, unlike that of any other from the same network
    files: list[str]  # in the folder given, the main one first
    hardware: str  # what it needs, as the passport records it
    version: str  # of the library that compiled it


class Instance(Protocol):
    """A place where one batch at a time runs: input memory of its own, and a share of the device.

    The owner writes rows into `pixels`, calls `start`, and touches neither until `done` was called.
    """

    pixels: Pixels  # [max_batch, H, W, C]
    units: int  # how many of the device's units it occupies while it runs

    def start(self, rows: int, done: OnDone) -> None:
        """Runs the first `rows` rows of `pixels`, 1 <= rows <= max_batch, and returns at once.

        `done` is called exactly once, maybe from a thread of the backend's and maybe before `start`
        returns, with the outputs or with an EngineFailure. After a failure the instance stays
        usable unless the engine was closed.
        """


class Engine(Protocol):
    """A loaded network. Rows are independent: a row's answer depends neither on its neighbours nor
    on its place. Its instances may run at the same time as far as the device's units allow."""

    max_batch: int
    device: str  # instances of engines on the same device share its units
    units: int  # what that device has
    instances: Sequence[Instance]

    def computed_rows(self, rows: int) -> int:
        """How many rows the device computes where it is given so many: more where it fills up."""

    def close(self) -> None:
        """Frees memory and threads. Nothing may be running; safe to call twice."""


class Backend(Protocol):
    """The functions of one file in this folder."""

    def version(self) -> str:
        """Exact version of the library, as a passport records it."""

    def hardware(self) -> str:
        """The machine's features that an engine is compiled for, for example "x86_64 amx_bf16"."""

    def best_precision(self) -> str:
        """The fastest precision this machine has natively."""

    def precisions(self) -> Sequence[str]:
        """The precisions this machine can compile for."""

    def compile(
        self, onnx: Path, folder: Path, target: CompileOptions, progress: Progress = ...
    ) -> CompiledEngine:
        """Compiles an ONNX file into `folder`. Raises EngineFailure."""

    def incompatibility(self, record: EngineRecord) -> str | None:
        """Why the engine can't run on this machine and what to do about it; None when it can.

        Reads nothing but the record, so it may be asked before anything is loaded.
        """

    def load(
        self, folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
    ) -> Engine:
        """Loads a compiled engine for rows of `shape` (H, W, C). Raises EngineFailure.

        `threads` is how many processor cores an engine on the CPU may keep busy.
        """


def backend(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown one, ImportError without
    its library."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; there are {', '.join(BACKENDS)}")
    return cast(Backend, import_module(f"server.engines.{name}"))


def ignore_progress(done: int, of: int | None) -> None:
    """Progress that nobody follows."""


def infer(instance: Instance, pixels: Pixels) -> Outputs:
    """Runs [N, H, W, C] on one instance and waits. Raises EngineFailure."""
    finished: SimpleQueue[Outputs | Exception] = SimpleQueue()
    instance.pixels[: len(pixels)] = pixels
    instance.start(len(pixels), finished.put)
    outcome = finished.get()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def instances_by_units(engine: Engine) -> list[list[Instance]]:
    """The engine's instances in groups of those that occupy as much of the device."""
    groups: dict[int, list[Instance]] = {}
    for instance in engine.instances:
        groups.setdefault(instance.units, []).append(instance)
    return list(groups.values())


def graph_sizes(record: EngineRecord) -> list[int]:
    """The batch sizes that get a graph of their own: powers of two, and the ends of the range."""
    least, most = record.min_batch, record.max_batch
    sizes = {1 << power for power in range(most.bit_length())} | {record.opt_batch}
    return sorted({size for size in sizes if least <= size <= most} | {least, most})


def padded_size(rows: int, sizes: Sequence[int]) -> int:
    """The least of the sizes, which ascend, that holds so many rows."""
    return next(size for size in sizes if size >= rows)
