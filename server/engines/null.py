"""The backend that computes nothing: for tests, and to measure everything but the engine.

It answers at once that every row is of class 0. Its engines hold no weights, only the number of
classes.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from server.engines.base import (
    CompiledEngine,
    CompileOptions,
    OnDone,
    Outputs,
    Progress,
    ignore_progress,
)
from server.errors import EngineFailure
from server.images.input_spec import Pixels

if TYPE_CHECKING:
    from server.repository.manifest import EngineRecord

FILE = "null.json"


class Sizes(Struct, frozen=True):
    """The engine's file."""

    classes: Annotated[int, Meta(ge=1, le=1 << 20)]
    top_k: Annotated[int, Meta(ge=1, le=1 << 20)]


def version() -> str:
    return "1"


def hardware() -> str:
    return platform.machine()


def best_precision() -> str:
    return "fp32"


def precisions() -> list[str]:
    return ["fp32"]


def compile(
    onnx: Path, folder: Path, target: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Keeps the widths of the graph's outputs, read by the library `onnx`."""
    from onnx import load_model

    try:
        outputs = load_model(onnx, load_external_data=False).graph.output
        widths = {output.name: output.type.tensor_type.shape.dim[-1] for output in outputs}
        sizes = Sizes(widths["probabilities"].dim_value, widths["classes"].dim_value)
    except Exception as error:  # protobuf's own, and what a strange graph makes of the lines above
        raise EngineFailure(f"null: {onnx.name} has no such outputs: {error!r}") from error
    (folder / FILE).write_bytes(msgspec.json.encode(sizes))
    return CompiledEngine(f"null-{target.precision}", [FILE], hardware(), version())


def incompatibility(record: EngineRecord) -> str | None:
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> NullEngine:
    path = folder / record.files[0].name
    try:
        sizes = msgspec.json.decode(path.read_bytes(), type=Sizes)
        return NullEngine(shape, record.max_batch, sizes)
    except (OSError, ValueError) as error:
        raise EngineFailure(f"null: {path.name} can't be used: {error}") from error


class NullInstance:
    """Answers within `start`."""

    units = 1

    def __init__(self, pixels: Pixels, answer: Outputs) -> None:
        self.pixels = pixels
        self._answer = answer

    def start(self, rows: int, done: OnDone) -> None:
        classes, scores, probabilities = self._answer
        done(Outputs(classes[:rows], scores[:rows], probabilities[:rows]))


class NullEngine:
    """Says of every row that it is class 0, then 1, 2, ..., with certainty."""

    device = "null"
    units = 1

    def __init__(self, shape: tuple[int, int, int], max_batch: int, sizes: Sizes) -> None:
        if sizes.top_k > sizes.classes:
            raise ValueError(f"top_k {sizes.top_k} of {sizes.classes} classes")
        self.max_batch = max_batch
        probabilities = np.zeros((max_batch, sizes.classes), np.float32)
        probabilities[:, 0] = 1
        order = np.tile(np.arange(sizes.top_k, dtype=np.int32), (max_batch, 1))
        answer = Outputs(order, probabilities[:, : sizes.top_k].copy(), probabilities)
        for array in answer:
            array.flags.writeable = False  # shared by all who ask
        self.instances = [NullInstance(np.zeros((max_batch, *shape), np.uint8), answer)]

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.instances = []
