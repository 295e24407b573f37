"""A backend that computes nothing, for tests and for measuring everything except the engine.

It answers at once: class 0 with probability 1. Its engine file stores only the number of classes.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

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
from server.repository.manifest import EngineRecord

FILE = "null.json"


class OutputSizes(Struct, frozen=True):
    """The content of the engine file."""

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
    onnx: Path, folder: Path, options: CompileOptions, progress: Progress = ignore_progress
) -> CompiledEngine:
    """Stores the sizes of the graph's outputs. Needs the `onnx` library."""
    from onnx import load_model

    try:
        outputs = load_model(onnx, load_external_data=False).graph.output
        widths = {output.name: output.type.tensor_type.shape.dim[-1] for output in outputs}
        sizes = OutputSizes(widths["probabilities"].dim_value, widths["classes"].dim_value)
    except Exception as error:  # from protobuf, or from the code above if the graph is unusual
        raise EngineFailure(
            f"null: {onnx.name} has no outputs 'probabilities' and 'classes': {error!r}"
        ) from error
    (folder / FILE).write_bytes(msgspec.json.encode(sizes))
    return CompiledEngine(f"null-{options.precision}", [FILE], hardware(), version())


def incompatibility(record: EngineRecord) -> str | None:
    return None


def load(
    folder: Path, record: EngineRecord, shape: tuple[int, int, int], *, threads: int
) -> NullEngine:
    path = folder / record.files[0].name
    try:
        sizes = msgspec.json.decode(path.read_bytes(), type=OutputSizes)
        return NullEngine(shape, record.max_batch, sizes)
    except (OSError, ValueError) as error:
        raise EngineFailure(f"null: can't load {path.name}: {error}") from error


class NullInstance:
    """Calls `on_done` before `start` returns."""

    units = 1

    def __init__(self, pixels: Pixels, answer: Outputs) -> None:
        self.pixels = pixels
        self._answer = answer

    def start(self, rows: int, on_done: OnDone) -> None:
        classes, scores, probabilities = self._answer
        on_done(Outputs(classes[:rows], scores[:rows], probabilities[:rows]))


class NullEngine:
    """Answers each row with class 0 at probability 1, then classes 1, 2, ... at probability 0."""

    device = "null"
    units = 1

    def __init__(self, shape: tuple[int, int, int], max_batch: int, sizes: OutputSizes) -> None:
        if sizes.top_k > sizes.classes:
            raise ValueError(f"top_k is {sizes.top_k}; it must be at most {sizes.classes}, classes")
        self.max_batch = max_batch
        probabilities = np.zeros((max_batch, sizes.classes), np.float32)
        probabilities[:, 0] = 1
        order = np.tile(np.arange(sizes.top_k, dtype=np.int32), (max_batch, 1))
        answer = Outputs(order, probabilities[:, : sizes.top_k].copy(), probabilities)
        for array in answer:
            array.flags.writeable = False  # all callers share these arrays
        self.instances = [NullInstance(np.zeros((max_batch, *shape), np.uint8), answer)]

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.instances = []
