"""Runs batches on one device: the loop between scheduler, engines, and callers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from server.engines.base import Engine, Instance, Outputs, RowSource, instances_by_units
from server.errors import DeviceLost, EngineFailure, ModelNotReady
from server.execution.engine_state import EngineState
from server.execution.pending_request import ExecutionResult, PendingRequest, fill
from server.execution.response_delay import ResponseDelayEstimator
from server.execution.responses import Responses
from server.execution.running_batches import RunningBatch, RunningBatches
from server.execution.wake_timer import WakeTimer
from server.images.input_spec import Pixels
from server.scheduling.base import Batch, InstanceGroup, Scheduler
from server.scheduling.latency import LatencyProfile, planned_sizes
from server.security.principal import LOCAL_CALLER, Principal
from server.telemetry.clock import clock
from server.telemetry.loop_lag import LoopLag
from server.telemetry.metrics import ModelMetrics
from server.telemetry.tracing import Trace, Tracing

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0


class Reservation:
    """Queue capacity that is reserved for an admitted request."""

    __slots__ = ("_engine", "_executor", "_request")

    def __init__(
        self, executor: DeviceExecutor, engine: EngineState, request: PendingRequest
    ) -> None:
        self._executor = executor
        self._engine = engine
        self._request = request

    @property
    def has_started(self) -> bool:
        """Whether a batch with rows of the request has started."""
        return self._request.started_s > 0

    async def run(self, pixels: Pixels | RowSource) -> ExecutionResult:
        """Classifies [N, H, W, C] uint8 and waits for the result. N rows must have been admitted.

        Raises Overloaded if the deadline cannot be met any more, EngineFailure, ModelNotReady, or
        what the `RowSource` raises. If the caller is cancelled, its rows do not run.
        """
        request, executor = self._request, self._executor
        assert len(pixels) == request.rows, "the number of rows that were admitted"
        now_s = clock()
        request.submit(pixels, now_s)
        executor._enqueue(self._engine, request, now_s)
        try:
            return await request.future
        except asyncio.CancelledError:
            self.release()
            raise
        finally:
            if not request.future.cancelled():
                executor._responses.loop_lag.task_started()

    def release(self) -> None:
        """Returns the reservation without running it. No effect if it was used or released."""
        self._executor._cancel(self._engine, self._request)


class DeviceExecutor:
    """Runs batches of any number of models on one device.

    All of it runs on the event loop's thread. The engines' threads only call `done`, which passes
    the outcome to the loop. The owner has to run `watch_for_stalls` as a task.

    The pixels of a request are copied once, into the input memory of the instance. The outputs of a
    request are views into the outputs of its batch.
    """

    def __init__(
        self,
        device: str,
        units: int,
        scheduler: Scheduler,
        loop_lag: LoopLag | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`loop_lag` counts the results that wait for the event loop."""
        self.device = device
        self.lost_reason = ""  # why this process cannot use the device any more
        self.response_delay = ResponseDelayEstimator()  # the API records each response
        self._scheduler = scheduler
        self._responses = Responses(units, scheduler, loop_lag or LoopLag(), tracing)
        self._running = RunningBatches(units)
        self._is_watching = True
        self._engines: dict[str, EngineState] = {}
        self._removed: dict[str, EngineState] = {}  # not closed yet
        self._loop = asyncio.get_running_loop()
        self._wake_timer = WakeTimer(lambda: self._dispatch(clock()))

    def add(
        self,
        name: str,
        engine: Engine,
        groups: Sequence[InstanceGroup],
        metrics: ModelMetrics,
        on_engine_failed: Callable[[str], None],
        objective_s: float,
        weight: float = 1.0,
        on_batch_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Adds a loaded engine under a new name. `groups` come from `profile_groups`.

        Both callbacks get the reason. `on_engine_failed` is called once, when the engine stalls or
        the device is lost. For `objective_s` and `weight` see `Scheduler.add`.
        """
        self._engines[name] = EngineState(
            name, engine, metrics, on_engine_failed, on_batch_failed, instances_by_units(engine)
        )
        self._scheduler.add(name, groups, objective_s=objective_s, weight=weight)

    async def drain(self, name: str, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Waits until no request of the model is queued or runs, or `is_wanted` returns False.

        New requests are still admitted, so the caller has to stop them first.
        """
        engine = self._engines.get(name)
        while engine is not None and self._has_requests(engine) and is_wanted():
            await engine.wait_for_progress()

    async def remove(self, name: str) -> None:
        """Rejects queued requests, waits for running batches, then closes the engine in a thread.

        An engine that fails meanwhile is not closed, because it may still be running. If the wait
        is cancelled, call `remove` again to continue.
        """
        if name in self._engines:
            self._removed[name] = self._stop_serving(name, f"{name} is being unloaded")
        engine = self._removed[name]
        await engine.close()
        self._removed.pop(name, None)

    def admit(
        self,
        name: str,
        rows: int,
        *,
        deadline_s: float = math.inf,
        priority: int = 0,
        principal: Principal = LOCAL_CALLER,
        ready_in_s: float = 0.0,
        trace: Trace | None = None,
    ) -> Reservation:
        """Reserves queue capacity for `rows` rows, or refuses the request.

        This happens before its images are decoded, so a refusal costs little.

        `deadline_s` is a time on `telemetry.clock`, the pixels are expected in `ready_in_s`. The
        request uses the share of its `principal`, and its batches are added to its `trace`. Raises
        Overloaded, DeadlineUnreachable, ModelNotReady. Call `run` or `release` of the reservation.
        """
        engine = self._engines.get(name)
        if engine is None:
            raise ModelNotReady(f"{name} is not loaded")
        now_s = clock()
        done_by_s = self.response_delay.batch_deadline_s(deadline_s, now_s)
        request = PendingRequest(
            rows,
            now_s,
            done_by_s,
            priority,
            principal,
            ready_s=now_s + ready_in_s,
            future=self._loop.create_future(),
            trace=trace,
        )
        self._scheduler.admit(name, request, now_s)
        return Reservation(self, engine, request)

    async def submit(
        self, name: str, pixels: Pixels, deadline_s: float = math.inf
    ) -> ExecutionResult:
        """Classifies [N, H, W, C] uint8: `admit` and `run` in one call."""
        return await self.admit(name, len(pixels), deadline_s=deadline_s).run(pixels)

    def queued_rows(self, name: str) -> int:
        """Rows of a model that are admitted and not in a batch yet."""
        return self._scheduler.queued_rows(name)

    async def watch_for_stalls(self) -> None:
        """Fails batches that never return, so that callers do not wait for ever."""
        while self._is_watching:
            self._running.sample(clock())
            await asyncio.sleep(WATCH_INTERVAL_S)
            now_s = clock()
            for run in self._running.abandon_stalled(now_s):
                seconds = now_s - run.started_s
                reason = f"a batch of {run.batch.rows} images has not finished in {seconds:.0f} s"
                error = EngineFailure(f"{run.engine.name}: {reason}")
                self._responses.fail_batch(run.batch, error)
                self._fail_engine(run.engine, reason)

    def stop(self) -> None:
        """Ends `watch_for_stalls` and cancels the timer."""
        self._is_watching = False
        self._wake_timer.cancel()

    def busy_ratio(self) -> float:
        """Busy units divided by all units of the device over the last seconds, 0 to 1."""
        return self._running.busy_ratio(clock())

    def _has_requests(self, engine: EngineState) -> bool:
        """Whether a model that is served has queued or running requests."""
        if self._engines.get(engine.name) is not engine:
            return False
        return engine.running > 0 or self._scheduler.queued_rows(engine.name) > 0

    def _enqueue(self, engine: EngineState, request: PendingRequest, now_s: float) -> None:
        if self._engines.get(engine.name) is not engine:
            error = ModelNotReady(f"{engine.name} is being unloaded")
            self._responses.fail(request, error)
            return
        self._scheduler.mark_ready(engine.name, request, now_s)
        self._dispatch(now_s)

    def _cancel(self, engine: EngineState, request: PendingRequest) -> None:
        if self._engines.get(engine.name) is engine:  # else its queue is gone
            self._scheduler.cancel(engine.name, request)
        engine.notify_progress()

    def _dispatch(self, now_s: float) -> None:
        """Starts all batches that can start."""
        scheduler = self._scheduler
        while (batch := scheduler.next_batch(now_s)) is not None:
            self._start(batch, now_s)
        for name, request in scheduler.take_expired():
            self._responses.fail_expired(self._engines.get(name), request, now_s)
        wake_s = scheduler.next_wake_s(now_s)
        if wake_s is not None:
            self._wake_timer.set(wake_s, now_s)

    def _start(self, batch: Batch, now_s: float) -> None:
        engine = self._engines[batch.model]
        instance = engine.take_instance(batch.group_index)
        for request, error in fill(instance, batch, now_s):  # the other requests of the batch run
            self._scheduler.cancel(batch.model, request)
            self._responses.fail(request, error)
        run = self._running.start(batch, engine, instance, now_s)

        def done(outcome: Outputs | Exception) -> None:
            self._loop.call_soon_threadsafe(self._batch_done, run, outcome, clock())

        try:
            instance.start(batch.rows, done)
        except Exception as error:  # the engine must not raise here; its callers get an answer
            log.exception("batch_start_failed", extra={"model": engine.name})
            done(EngineFailure(f"the engine failed to start a batch: {type(error).__name__}"))

    def _batch_done(self, run: RunningBatch, outcome: Outputs | Exception, done_s: float) -> None:
        engine, batch = run.engine, run.batch
        self._running.finish(run, done_s)
        engine.return_instance(batch.group_index, run.instance)
        self._scheduler.batch_finished(batch, done_s, done_s - run.started_s)
        if isinstance(outcome, DeviceLost):
            self._lose_device(outcome)
        # If requests wait, start the next batch first: the engine must not wait for the responses.
        # If not, respond first: then the response does not wait for the scheduler.
        is_removed = engine.name not in self._engines
        dispatch_first = is_removed or self._scheduler.queued_rows(engine.name) > 0
        if dispatch_first:
            self._dispatch(clock())
        if run.is_abandoned:
            pass  # its requests have failed already
        elif isinstance(outcome, Exception):
            self._fail_batch(run, outcome)
        else:
            self._responses.succeed_batch(run, outcome, done_s)
        self._loop.call_soon(self._after_responses, run, done_s, not dispatch_first)
        if not engine.running and engine.name not in self._engines:
            engine.notify_no_batches()
        engine.notify_progress()

    def _fail_batch(self, run: RunningBatch, error: Exception) -> None:
        engine, batch = run.engine, run.batch
        extra = {"model": engine.name, "rows": batch.rows, "error": str(error)}
        log.error("batch_failed", extra=extra)
        self._responses.fail_batch(batch, error)
        engine.on_batch_failed(str(error))

    def _after_responses(self, run: RunningBatch, done_s: float, dispatch: bool) -> None:
        """Work that can wait until the callers of a batch have resumed."""
        if dispatch:
            self._dispatch(clock())
        self._responses.record_batch(run, done_s)

    def _fail_engine(self, engine: EngineState, reason: str) -> None:
        """Stops serving an engine that does not work any more."""
        if engine.has_failed:
            return
        engine.mark_failed()
        if self._engines.get(engine.name) is engine:
            self._stop_serving(engine.name, f"{engine.name} has failed: {reason}")
        engine.on_engine_failed(reason)

    def _lose_device(self, error: DeviceLost) -> None:
        """Fails everything on the device: this process cannot use it any more."""
        self.lost_reason = f"the device {self.device} is lost: {error}; restart the server"
        for run in self._running.abandon_all():
            self._responses.fail_batch(run.batch, error)
        for engine in list(self._engines.values()):
            self._fail_engine(engine, self.lost_reason)

    def _stop_serving(self, name: str, reason: str) -> EngineState:
        """Admits no more requests for a model and rejects the queued ones."""
        engine = self._engines.pop(name)
        for request in self._scheduler.remove(name):
            self._responses.fail(request, ModelNotReady(reason))
        engine.notify_progress()
        return engine


def profile_groups(
    engine: Engine, measure: Callable[[Instance, int], float]
) -> list[InstanceGroup]:
    """The engine's instance groups with their profiles.

    `measure(instance, rows)` returns the seconds of one batch.
    """
    groups = []
    for instances in instances_by_units(engine):
        sizes = planned_sizes(engine.max_batch)
        profile = LatencyProfile({size: measure(instances[0], size) for size in sizes})
        groups.append(InstanceGroup(instances[0].units, len(instances), engine.max_batch, profile))
    return groups
