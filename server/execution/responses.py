"""Gives results and errors to the callers of requests, and records them."""

from __future__ import annotations

import math

from server.engines.base import Outputs
from server.errors import Overloaded
from server.execution.engine_state import EngineState
from server.execution.pending_request import PendingRequest
from server.execution.running_batches import RunningBatch
from server.scheduling.base import Batch, Request, Scheduler
from server.security.principal import ANONYMOUS
from server.telemetry.loop_lag import LoopLag
from server.telemetry.tracing import Tracing


class Responses:
    """Completes requests. Every admitted request is completed exactly once."""

    def __init__(
        self, units: int, scheduler: Scheduler, loop_lag: LoopLag, tracing: Tracing | None
    ) -> None:
        """`units` are those of the device."""
        self._units = units
        self._scheduler = scheduler
        self.loop_lag = loop_lag
        self._tracing = tracing

    def succeed_batch(self, run: RunningBatch, outputs: Outputs, done_s: float) -> None:
        metrics, batch = run.engine.metrics, run.batch
        row = wasted = 0
        for request, first, rows in batch.parts:
            assert isinstance(request, PendingRequest)
            part = outputs.rows(row, row + rows)
            row += rows
            if request.future.done():  # cancelled, or another batch of the request failed
                wasted += rows
                continue
            if request.add_outputs(first, rows, part, done_s):
                self.loop_lag.task_queued()
                if request.predicted_s < math.inf:  # not all schedulers predict
                    metrics.predicted(request.predicted_s - done_s)
        if wasted:
            metrics.wasted(wasted / batch.rows * (done_s - run.started_s))

    def fail(self, request: Request, error: Exception) -> None:
        assert isinstance(request, PendingRequest)
        if not request.future.done():
            self.loop_lag.task_queued()
            request.fail(error)

    def fail_batch(self, batch: Batch, error: Exception) -> None:
        """Fails all requests of the batch, with their rows that are not in a batch yet."""
        for request, _, _ in batch.parts:
            self._scheduler.cancel(batch.model, request)
            self.fail(request, error)

    def fail_expired(self, engine: EngineState | None, request: Request, now_s: float) -> None:
        """Fails a request that the scheduler cancelled because of its deadline."""
        if engine is not None:
            engine.metrics.deadline_missed("queue")
            engine.notify_progress()
        predicted_s = request.predicted_s - request.arrived_s
        error = Overloaded(
            f"the deadline cannot be met any more: {predicted_s * 1e3:.0f} ms were predicted at "
            "admission, but the engine has become slower",
            retry_after_s=max(0.0, now_s - request.predicted_s) + predicted_s,
        )
        self.fail(request, error)

    def record_batch(self, run: RunningBatch, done_s: float) -> None:
        """Updates metrics and traces. Call it when the callers of the batch have resumed."""
        engine, batch = run.engine, run.batch
        seconds = done_s - run.started_s
        engine.metrics.batch(batch.rows, seconds, engine.engine.computed_rows(batch.rows))
        if batch.parts[0].request.principal.name != ANONYMOUS:
            row_s = seconds * batch.units / self._units / batch.rows
            for part in batch.parts:
                engine.metrics.device_used(part.request.principal.name, part.rows * row_s)
        if self._tracing is not None:
            requests = [part.request for part in batch.parts]
            traces = [
                request.trace
                for request in requests
                if isinstance(request, PendingRequest) and request.trace is not None
            ]
            if traces:
                self._tracing.batch(engine.name, batch.rows, run.started_s, done_s, traces)
