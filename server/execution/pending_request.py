"""A request while it waits and runs, and its result."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engines.base import Instance, Outputs, RowSource
from server.errors import EngineFailure, ServingError
from server.images.input_spec import Pixels
from server.scheduling.base import Batch, Request
from server.telemetry.tracing import Trace


class ExecutionResult(NamedTuple):
    """The outputs for the rows of one request, and where its time went."""

    outputs: Outputs
    queue_s: float  # from submission to the start of its first batch
    compute_s: float  # from there to the end of its last batch
    batch_rows: tuple[int, ...]  # total rows of each batch that it was part of
    done_s: float  # end of its last batch, on `clock`


@dataclass(slots=True, eq=False)
class PendingRequest(Request):
    """A request of the scheduler, with its pixels, its result, and its times."""

    future: asyncio.Future[ExecutionResult] = field(kw_only=True)
    trace: Trace | None = None
    pixels: Pixels | RowSource | None = None
    submitted_s: float = 0.0
    started_s: float = 0.0
    batch_rows: tuple[int, ...] = ()
    _done_rows: int = 0
    _outputs: list[tuple[int, Outputs]] = field(default_factory=list)  # if it needs several batches

    def submit(self, pixels: Pixels | RowSource, now_s: float) -> None:
        self.pixels = pixels
        self.submitted_s = now_s

    def add_outputs(self, first: int, rows: int, outputs: Outputs, done_s: float) -> bool:
        """Adds the outputs of one batch. Completes the request if they are the last ones.

        Returns whether it is complete.
        """
        if rows < self.rows:
            self._done_rows += rows
            self._outputs.append((first, outputs))
            if self._done_rows < self.rows:
                return False
            ordered = sorted(self._outputs, key=lambda entry: entry[0])
            outputs = Outputs.concatenate([outputs for _, outputs in ordered])
        self.future.set_result(
            ExecutionResult(
                outputs,
                self.started_s - self.submitted_s,
                done_s - self.started_s,
                self.batch_rows,
                done_s,
            )
        )
        return True

    def fail(self, error: Exception) -> None:
        known = error if isinstance(error, ServingError) else EngineFailure(str(error))
        self.future.set_exception(known)


def fill(instance: Instance, batch: Batch, now_s: float) -> list[tuple[PendingRequest, Exception]]:
    """Copies the pixels of all requests into the input memory of the instance.

    Returns the requests whose pixels cannot be read. Their rows keep the pixels of an older batch.
    """
    failures: list[tuple[PendingRequest, Exception]] = []
    row = 0
    for request, first, rows in batch.parts:
        assert isinstance(request, PendingRequest)
        pixels = request.pixels
        assert pixels is not None
        if isinstance(pixels, RowSource):
            try:
                pixels.copy_into(instance.pixels[row : row + rows], first)
            except Exception as error:
                failures.append((request, error))
        else:
            instance.pixels[row : row + rows] = pixels[first : first + rows]
        row += rows
        if first == 0:
            request.started_s = now_s
        request.batch_rows += (batch.rows,)
    return failures
