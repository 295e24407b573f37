"""An engine that is a Python function, for tests of what checks engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from server.engines.base import Instance, OnDone, Outputs
from server.images.input_spec import Pixels

SHAPE = (4, 4, 3)
MAX_BATCH = 5


def outputs(probabilities: NDArray[np.float32]) -> Outputs:
    """The outputs of an engine that computes these probabilities."""
    classes = np.argsort(-probabilities, axis=1, kind="stable")[:, :10].astype(np.int32)
    scores = np.take_along_axis(probabilities, classes, axis=1)
    return Outputs(classes, scores, probabilities)


class FunctionEngine:
    """An engine with one instance, itself, that calls a function: [N, H, W, C] -> outputs."""

    device = "test"
    units = 1

    def __init__(
        self,
        answer: Callable[[Pixels], Outputs],
        shape: tuple[int, ...] = SHAPE,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self.max_batch = max_batch
        self.pixels = np.zeros((max_batch, *shape), np.uint8)
        self.instances: Sequence[Instance] = [self]
        self.sizes: set[int] = set()
        self._answer = answer

    def start(self, rows: int, on_done: OnDone) -> None:
        self.sizes.add(rows)
        on_done(self._answer(self.pixels[:rows].copy()))

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        pass
