"""The mechanism: one device, its engines, and the loop that asks schedule.py and runs batches.

`Host.submit` is all that the RPCs see of a device. Rows are copied once, from the caller's message
into the input memory of the instance that runs them; a caller gets views of its own rows.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engines.base import Engine, Instance, Outputs, RowSource, instances_by_units
from server.errors import DeviceLost, EngineFailure, ModelNotReady, Overloaded, ServingError
from server.images.input_spec import Pixels
from server.scheduling.deadline import (
    Batch,
    InstanceGroup,
    LatencyProfile,
    Request,
    Scheduler,
    planned_sizes,
)
from server.telemetry.loop_lag import LoopLag
from server.telemetry.metrics import ModelMetrics
from server.telemetry.tracing import Trace, Tracing

log = logging.getLogger(__name__)

clock = time.monotonic  # the loop's own clock ticks in milliseconds under uvloop

# A batch that runs so many times longer than its profile says, and so long, is taken for dead.
STALL_FACTOR = 50
STALL_S = 10.0

WATCH_S = 1.0
BUSY_WINDOW_TICKS = 5


class ResponseDelayEstimator:
    """What an answer takes from its engine to its caller: it must be done by so much earlier.

    Learned from the part we see, the encoding: its mean and four times its mean deviation, as TCP
    learns when to send again (Jacobson 1988). The rest is the wire and the caller's own doing.

    What was learned fades while nothing is, and takes half of a caller's time at most: else one
    moment in which the process stood still would have every call refused whose deadline is shorter
    than that, and where nobody is admitted nothing is learned any more. (Seen with LeNet-5 and
    deadlines of 20 ms: after the first hiccup no call was answered again.)
    """

    WIRE_S = 0.001
    HALF_LIFE_S = 0.05
    MOST = 0.5  # of the time that a caller has

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._learned_s = -math.inf

    def learn(self, seconds: float, now_s: float) -> None:
        error_s = seconds - self._mean_s
        self._mean_s += error_s / 8
        self._deviation_s += (abs(error_s) - self._deviation_s) / 4
        self._learned_s = now_s

    def before(self, deadline_s: float, now_s: float) -> float:
        """When an answer must be done that is to be there by the deadline."""
        kept: float = 0.5 ** ((now_s - self._learned_s) / self.HALF_LIFE_S)
        seconds = self.WIRE_S + kept * (self._mean_s + 4 * self._deviation_s)
        return deadline_s - max(0.0, min(seconds, self.MOST * (deadline_s - now_s)))


class Answer(NamedTuple):
    """What a call gets: its own rows, and where its time went."""

    outputs: Outputs
    queue_s: float  # from submission until its first batch started
    compute_s: float  # from then until its last batch was done
    batch_rows: tuple[int, ...]  # rows of each batch that carried some of its rows
    done_s: float  # when its last batch was done, on `clock`


@dataclass(slots=True, eq=False)
class _PendingRequest(Request):
    """A call with what the mechanism needs to answer it."""

    answer: asyncio.Future[Answer] = field(kw_only=True)
    pixels: Pixels | RowSource | None = None
    submitted_s: float = 0.0
    started_s: float = 0.0
    done_rows: int = 0
    trace: Trace | None = None
    batch_rows: tuple[int, ...] = ()
    parts: list[tuple[int, Outputs]] = field(default_factory=list)  # of a call in several batches


@dataclass(slots=True, eq=False)
class _RunningBatch:
    """A batch on its way through an instance."""

    batch: Batch
    served: _LoadedEngine
    instance: Instance
    started_s: float
    limit_s: float  # later than this it is taken for dead
    abandoned: bool = False


@dataclass(slots=True, eq=False)
class _LoadedEngine:
    """A model on this device."""

    name: str
    engine: Engine
    lanes: list[InstanceGroup]
    idle: list[list[Instance]]  # by lane
    metrics: ModelMetrics
    failed: Callable[[str], None]  # told once, with the reason, when the engine is given up
    erred: Callable[[str], None]  # told of every batch that fails
    running: int = 0
    given_up: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    fewer: asyncio.Event | None = None  # told that some have left, while one waits for all to


class Reservation:
    """A call's place in the queue of a model."""

    __slots__ = ("_host", "_job", "_served")

    def __init__(self, host: DeviceExecutor, served: _LoadedEngine, job: _PendingRequest) -> None:
        self._host = host
        self._served = served
        self._job = job

    @property
    def started(self) -> bool:
        """Whether a batch with some of its rows has started."""
        return self._job.started_s > 0

    async def answer(self, pixels: Pixels | RowSource) -> Answer:
        """Classifies [N, H, W, C] uint8, as many rows as were admitted, and waits for the answer.

        Raises Overloaded where it has become too late for one, EngineFailure, ModelNotReady, or
        what `RowSource` do. A caller that is cancelled costs nothing more.
        """
        job = self._job
        assert len(pixels) == job.rows, "as many rows as were admitted"
        job.pixels = pixels
        now_s = job.submitted_s = clock()
        self._host._ready(self._served, job, now_s)
        try:
            return await job.answer
        except asyncio.CancelledError:
            self.leave()
            raise
        finally:
            if not job.answer.cancelled():
                self._host._backlog.begins()

    def trace(self, trace: Trace) -> None:
        """Has the batches of its rows tell the host's `tracing` of the call."""
        self._job.trace = trace

    def leave(self) -> None:
        """Gives the place back; nothing happens where it has been used up."""
        self._host._policy.cancel(self._served.name, self._job)
        self._host._left(self._served)


class DeviceExecutor:
    """Runs batches of any number of models on one device.

    Everything happens on the event loop's thread; of the engines' threads only `_done` is called,
    and it does no more than hand the outcome over to the loop. `watch` is run by whoever owns the
    host and ends when cancelled.
    """

    def __init__(
        self, device: str, units: int, policy: Scheduler, backlog: LoopLag | None = None
    ) -> None:
        """`backlog` is told of the answers that wait for the loop."""
        self.device = device
        self._backlog = backlog or LoopLag()
        self._units = units
        self._policy = policy
        self.lost = ""  # why the device can be used no more by this process
        self._busy_s = 0.0  # unit-seconds of finished batches
        self._history: deque[tuple[float, float]] = deque(maxlen=BUSY_WINDOW_TICKS)
        self._watching = True
        self._served: dict[str, _LoadedEngine] = {}
        self._leaving: dict[str, _LoadedEngine] = {}  # forgotten, and not closed yet
        self._runs: set[_RunningBatch] = set()
        self.response_delay = ResponseDelayEstimator()  # told by whoever sends the answers
        self.tracing: Tracing | None = None
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.TimerHandle | None = None  # where the policy wants to be asked again
        self._wake_s = math.inf

    def add(
        self,
        name: str,
        engine: Engine,
        lanes: Sequence[InstanceGroup],
        metrics: ModelMetrics,
        failed: Callable[[str], None],
        objective_s: float,
        weight: float = 1.0,
        erred: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Takes a loaded engine in; `name` must be new. `lanes` are those `lanes_of` found,
        `failed` is told when the engine is given up, `erred` of every batch that fails; for the
        rest see `Policy.add`."""
        groups = instances_by_units(engine)
        self._served[name] = _LoadedEngine(
            name, engine, list(lanes), groups, metrics, failed, erred
        )
        self._policy.add(name, lanes, objective_s=objective_s, weight=weight)

    async def drain(self, name: str, still: Callable[[], bool] = lambda: True) -> None:
        """Waits until nobody has a place in the model's queue and nothing runs, as long as that is
        `still` wanted. Places are given to who asks: it ends only where nobody does."""
        served = self._served.get(name)
        while served is not None and self._busy(served) and still():
            served.fewer = asyncio.Event()
            await served.fewer.wait()

    async def remove(self, name: str) -> None:
        """Refuses what still waits for the model, lets what runs finish, and closes the engine, off
        the loop.

        An engine that is given up meanwhile is left as it is: something may still run in it. Where
        the wait is cancelled, asking again takes it up.
        """
        if name in self._served:
            self._leaving[name] = self._forget(name, f"{name} is being unloaded")
        served = self._leaving[name]
        if served.running:
            await served.drained.wait()
        if not served.given_up:
            served.idle.clear()  # else its instances would be freed here, with us
            await asyncio.to_thread(served.engine.close)  # tens of milliseconds, or a thread's end
        self._leaving.pop(name, None)

    def admit(
        self, name: str, rows: int, *, deadline_s: float = math.inf, priority: int = 0
    ) -> Reservation:
        """A place in the queue for `rows` rows, before there is anything to put there: what can't
        be answered in time is refused before it is decoded.

        `deadline_s` is a time on `host.clock`. Raises Overloaded, DeadlineUnreachable or
        ModelNotReady. The place must be used, by `answer`, or given back by `leave`.
        """
        served = self._served.get(name)
        if served is None:
            raise ModelNotReady(f"{name} is not loaded")
        now_s = clock()
        due_s = self.response_delay.before(deadline_s, now_s)
        job = _PendingRequest(rows, now_s, due_s, priority, answer=self._loop.create_future())
        self._policy.admit(name, job, now_s)
        return Reservation(self, served, job)

    async def submit(self, name: str, pixels: Pixels, deadline_s: float = math.inf) -> Answer:
        """Classifies [N, H, W, C] uint8: `admit` and `answer` in one."""
        return await self.admit(name, len(pixels), deadline_s=deadline_s).answer(pixels)

    def waiting(self, name: str) -> int:
        """Rows queued for a model."""
        return self._policy.waiting(name)

    async def watch(self) -> None:
        """Gives up engines that have stopped answering, so that no caller waits for ever."""
        while self._watching:
            self._history.append((clock(), self._busy_until_now()))
            await asyncio.sleep(WATCH_S)
            now_s = clock()
            for run in [run for run in self._runs if now_s > run.limit_s]:
                self._runs.discard(run)
                run.abandoned = True  # its lane stays taken: the engine may still write there
                silent_s = now_s - run.started_s
                reason = f"a batch of {run.batch.rows} has not come back for {silent_s:.0f} s"
                self._fail_batch(run.batch, EngineFailure(f"{run.served.name}: {reason}"))
                self._abandon(run.served, reason)

    def _lose(self, error: DeviceLost) -> None:
        """The device is lost to this process: whatever runs there will not come back."""
        self.lost = f"the device {self.device} is lost; start the server anew: {error}"
        for run in self._runs:
            run.abandoned = True
            self._fail_batch(run.batch, error)
        self._runs.clear()
        for served in list(self._served.values()):
            self._abandon(served, self.lost)

    def stop(self) -> None:
        """Lets `watch` end."""
        self._watching = False
        if self._wake is not None:
            self._wake.cancel()

    def busy_ratio(self) -> float:
        """Share of the device's units at work over the last seconds, 0 to 1."""
        if not self._history:
            return 0.0
        since_s, busy_s = self._history[0]
        elapsed_s = clock() - since_s
        if elapsed_s <= 0:
            return 0.0
        return min(1.0, (self._busy_until_now() - busy_s) / (elapsed_s * self._units))

    def _busy_until_now(self) -> float:
        now_s = clock()
        return self._busy_s + sum(
            (now_s - run.started_s) * run.instance.units for run in self._runs
        )

    def _ready(self, served: _LoadedEngine, job: _PendingRequest, now_s: float) -> None:
        if self._served.get(served.name) is not served:
            self._fail(job, ModelNotReady(f"{served.name} is being unloaded"))
            return
        self._policy.ready(served.name, job, now_s)
        self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        """Starts whatever can start. Cheap when nothing can."""
        while (batch := self._policy.next(now_s)) is not None:
            self._start(batch, now_s)
        for name, call in self._policy.take_expired():
            self._give_up(name, call, now_s)
        wake_s = self._policy.wake_s(now_s)
        if wake_s is not None and (self._wake is None or wake_s < self._wake_s):
            if self._wake is not None:
                self._wake.cancel()
            self._wake_s = wake_s
            self._wake = self._loop.call_later(max(0.0, wake_s - now_s), self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._dispatch(clock())

    def _busy(self, served: _LoadedEngine) -> bool:
        """Whether a model that is served has calls to answer."""
        if self._served.get(served.name) is not served:
            return False
        return served.running > 0 or self._policy.waiting(served.name) > 0

    def _left(self, served: _LoadedEngine) -> None:
        """Wakes who waits in `drain`."""
        if served.fewer is not None:
            served.fewer.set()

    def _give_up(self, name: str, call: Request, now_s: float) -> None:
        served = self._served.get(name)
        if served is not None:
            served.metrics.deadline_missed("queue")
            self._left(served)
        late_s = max(0.0, now_s - call.predicted_s)
        self._fail(
            call,
            Overloaded(
                f"engines are slower than they were: the answer was promised within "
                f"{(call.predicted_s - call.arrived_s) * 1e3:.0f} ms and can't be in time any more",
                retry_after_s=late_s + (call.predicted_s - call.arrived_s),
            ),
        )

    def _start(self, batch: Batch, now_s: float) -> None:
        served = self._served[batch.model]
        instance = served.idle[batch.lane].pop()
        row = 0
        for call, first, rows in batch.portions:
            assert isinstance(call, _PendingRequest)
            assert call.pixels is not None
            if isinstance(call.pixels, RowSource):
                self._fetch(batch.model, call, instance.pixels[row : row + rows], first)
            else:
                instance.pixels[row : row + rows] = call.pixels[first : first + rows]
            row += rows
            if first == 0:
                call.started_s = now_s
            call.batch_rows += (batch.rows,)
        limit_s = max(STALL_S, STALL_FACTOR * batch.expected_s)
        run = _RunningBatch(batch, served, instance, now_s, now_s + limit_s)
        self._runs.add(run)
        served.running += 1

        def done(outcome: Outputs | Exception) -> None:
            self._loop.call_soon_threadsafe(self._finished, run, outcome, clock())

        try:
            instance.start(batch.rows, done)
        except Exception as error:  # a promise of the engine's broken; ours to the callers is not
            log.exception("engine_start_failed", extra={"model": served.name})
            done(EngineFailure(f"{type(error).__name__} at the start of a batch"))

    def _fetch(self, model: str, call: _PendingRequest, target: Pixels, first: int) -> None:
        """Rows of a call that stand elsewhere; a call whose rows are gone fails alone."""
        assert isinstance(call.pixels, RowSource)
        try:
            call.pixels.copy_into(target, first)
        except Exception as error:
            self._policy.cancel(model, call)
            self._fail(call, error)

    def _abandon(self, served: _LoadedEngine, reason: str) -> None:
        """Gives an engine up: nobody shall wait for it any more."""
        if served.given_up:
            return
        served.given_up = True
        if self._served.get(served.name) is served:
            self._forget(served.name, f"{served.name} has failed: {reason}")
        served.drained.set()
        served.failed(reason)

    def _forget(self, name: str, reason: str) -> _LoadedEngine:
        """Takes no more calls for a model and refuses those that wait."""
        served = self._served.pop(name)
        for call in self._policy.remove(name):
            self._fail(call, ModelNotReady(reason))
        self._left(served)
        return served

    def _finished(self, run: _RunningBatch, outcome: Outputs | Exception, done_s: float) -> None:
        served, batch = run.served, run.batch
        self._runs.discard(run)
        served.idle[batch.lane].append(run.instance)
        served.running -= 1
        seconds = done_s - run.started_s
        self._busy_s += seconds * run.instance.units
        self._policy.finished(batch, done_s, seconds)
        if isinstance(outcome, DeviceLost):
            self._lose(outcome)
        # The engine first, where somebody waits for it: it need not wait for answers to be written.
        # A caller alone waits for nothing but its answer: the rest comes behind that.
        crowd = served.name not in self._served or self._policy.waiting(served.name) > 0
        if crowd:
            self._dispatch(clock())
        if run.abandoned:  # its callers have been told
            pass
        elif isinstance(outcome, Exception):
            log.error(
                "batch_failed",
                extra={"model": served.name, "rows": batch.rows, "error": str(outcome)},
            )
            self._fail_batch(batch, outcome)
            served.erred(str(outcome))
        else:
            self._answer_batch(served, batch, outcome, done_s, seconds)
        self._loop.call_soon(self._afterwards, run, done_s, not crowd)
        if not served.running and served.name not in self._served:
            served.drained.set()
        self._left(served)

    def _afterwards(self, run: _RunningBatch, done_s: float, pump: bool) -> None:
        """What is left to do once those who write the answers of a batch have been asked to."""
        if pump:
            self._dispatch(clock())
        served, batch = run.served, run.batch
        seconds = done_s - run.started_s
        served.metrics.batch(batch.rows, seconds, served.engine.computed_rows(batch.rows))
        if self.tracing is not None:
            jobs = [call for call, _, _ in batch.portions if isinstance(call, _PendingRequest)]
            if traces := [job.trace for job in jobs if job.trace is not None]:
                self.tracing.batch(served.name, batch.rows, run.started_s, done_s, traces)

    def _answer_batch(
        self, served: _LoadedEngine, batch: Batch, outputs: Outputs, done_s: float, seconds: float
    ) -> None:
        row = wasted = 0
        for call, first, rows in batch.portions:
            assert isinstance(call, _PendingRequest)
            part = outputs.rows(row, row + rows)
            row += rows
            call.done_rows += rows
            if call.answer.done():  # its caller has left, or another batch of it failed
                wasted += rows
                continue
            if rows < call.rows:
                call.parts.append((first, part))
                if call.done_rows < call.rows:
                    continue
                ordered = [outputs for _, outputs in sorted(call.parts, key=lambda part: part[0])]
                part = Outputs.concatenate(ordered)
            self._backlog.waits()
            call.answer.set_result(
                Answer(
                    part,
                    call.started_s - call.submitted_s,
                    done_s - call.started_s,
                    call.batch_rows,
                    done_s,
                )
            )
            if call.predicted_s < math.inf:  # only some policies predict
                served.metrics.predicted(call.predicted_s - done_s)
        if wasted:
            served.metrics.wasted(wasted / batch.rows * seconds)

    def _fail(self, call: Request, error: Exception) -> None:
        assert isinstance(call, _PendingRequest)
        if not call.answer.done():
            known = error if isinstance(error, ServingError) else EngineFailure(str(error))
            self._backlog.waits()
            call.answer.set_exception(known)

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        for call, _, _ in batch.portions:
            self._policy.cancel(batch.model, call)  # a call fails whole
            self._fail(call, error)


def lanes_of(engine: Engine, measure: Callable[[Instance, int], float]) -> list[InstanceGroup]:
    """The lanes of an engine, each with its profile by `measure(instance, rows)` in seconds."""
    lanes = []
    for group in instances_by_units(engine):
        sizes = planned_sizes(engine.max_batch)
        profile = LatencyProfile({size: measure(group[0], size) for size in sizes})
        lanes.append(InstanceGroup(group[0].units, len(group), engine.max_batch, profile))
    return lanes
