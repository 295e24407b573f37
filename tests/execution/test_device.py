"""The mechanism answers every admitted call exactly once, and only with its own rows."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from server.engines.base import Instance, OnDone, Outputs, RowSource
from server.errors import (
    DeadlineUnreachable,
    DeviceLost,
    EngineFailure,
    InvalidInput,
    ModelNotReady,
    Overloaded,
)
from server.execution import device, running_batches
from server.execution.device import DeviceExecutor, profile_groups
from server.execution.pending_request import ExecutionResult
from server.execution.response_delay import ResponseDelayEstimator
from server.images.input_spec import Pixels
from server.scheduling.base import Scheduler
from server.scheduling.deadline import DeadlineScheduler
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

SHAPE = (2, 2, 1)


class Scripted:
    """An engine whose batches end when the test says so, on another thread as real ones do.

    A row is found to be of the class its first byte names.
    """

    device = "scripted"

    def __init__(self, instances: int = 1, max_batch: int = 4, *, held: bool = False) -> None:
        self.units = instances
        self.max_batch = max_batch
        self.held = held
        self.failure: Exception | None = None
        self.broken = False
        self.batches: list[list[int]] = []  # the first bytes of each batch's rows
        self.started: asyncio.Queue[int] = asyncio.Queue()
        self.closed = False
        self.instances: Sequence[Instance] = [_Instance(self, max_batch) for _ in range(instances)]
        self._waiting: list[Callable[[], None]] = []

    def run(self, rows: Pixels, done: OnDone) -> None:
        if self.broken:
            raise RuntimeError("it does not start")
        first = rows[:, 0, 0, 0].astype(np.int32)
        self.batches.append(first.tolist())
        probabilities = np.eye(256, dtype=np.float32)[first]
        answer = Outputs(first[:, np.newaxis], np.ones((len(rows), 1), np.float32), probabilities)
        outcome: Outputs | Exception = self.failure or answer
        thread = threading.Thread(target=done, args=(outcome,))
        if self.held:
            self._waiting.append(thread.start)
        else:
            thread.start()
        self.started.put_nowait(len(rows))

    def release(self, *, last_first: bool = False) -> None:
        """Lets what runs end, and what comes."""
        self.held = False
        waiting, self._waiting = self._waiting, []
        for start in reversed(waiting) if last_first else waiting:
            start()

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        self.closed = True


class _Instance:
    units = 1

    def __init__(self, engine: Scripted, max_batch: int) -> None:
        self.pixels = np.zeros((max_batch, *SHAPE), np.uint8)
        self._engine = engine

    def start(self, rows: int, done: OnDone) -> None:
        self._engine.run(self.pixels[:rows], done)


@dataclass
class Bench:
    host: DeviceExecutor
    engine: Scripted
    metrics: Metrics
    failures: list[str] = field(default_factory=list)

    def ask(self, *classes: int, deadline_s: float = 1e9) -> asyncio.Task[ExecutionResult]:
        pixels = np.zeros((len(classes), *SHAPE), np.uint8)
        pixels[:, 0, 0, 0] = classes
        return asyncio.create_task(self.host.submit("m", pixels, clock() + deadline_s))

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"model": "m", **labels})


@asynccontextmanager
async def hosting(
    engine: Scripted, policy: Scheduler | None = None, *, watch: bool = False
) -> AsyncIterator[Bench]:
    policy = policy or DeadlineScheduler(engine.units, 64)
    metrics = Metrics()
    bench = Bench(DeviceExecutor(engine.device, engine.units, policy), engine, metrics)
    bench.host.add(
        "m",
        engine,
        profile_groups(engine, lambda instance, rows: 0.001),
        metrics.model("m"),
        on_engine_failed=bench.failures.append,
        objective_s=10.0,
    )
    watching = asyncio.create_task(bench.host.watch_for_stalls()) if watch else None
    try:
        async with asyncio.timeout(30):
            yield bench
    finally:
        engine.release()
        bench.host.stop()
        if watching:
            watching.cancel()


def found(answer: ExecutionResult) -> list[int]:
    return [int(row[0]) for row in answer.outputs.classes]


async def test_every_caller_gets_its_own_rows() -> None:
    async with hosting(Scripted(instances=2)) as bench:
        answers = await asyncio.gather(*(bench.ask(n, n + 1) for n in range(30)))
        assert [found(answer) for answer in answers] == [[n, n + 1] for n in range(30)]


class Elsewhere(RowSource):
    """Rows of that class, which remember what they were copied into; it breaks at a `failure`."""

    def __init__(self, count: int, of: int, failure: Exception | None = None) -> None:
        self.targets: list[Pixels] = []
        self._count, self._of, self._failure = count, of, failure

    def __len__(self) -> int:
        return self._count

    def copy_into(self, target: Pixels, first: int) -> None:
        if self._failure is not None:
            raise self._failure
        self.targets.append(target)
        target[:, 0, 0, 0] = range(self._of + first, self._of + first + len(target))


async def test_rows_that_stand_elsewhere_are_copied_once_into_the_batch() -> None:
    async with hosting(Scripted()) as bench:
        lent = Elsewhere(6, 20)
        place = bench.host.admit("m", 6)
        assert found(await place.run(lent)) == [20, 21, 22, 23, 24, 25]
        memory = [instance.pixels for instance in bench.engine.instances]
        for target in lent.targets:
            assert any(np.shares_memory(target, pixels) for pixels in memory)


@pytest.mark.parametrize("failure", [InvalidInput("region", "is gone"), OSError("broken")])
async def test_rows_that_are_gone_fail_their_own_call_alone(failure: Exception) -> None:
    async with hosting(Scripted(held=True)) as bench:
        first = bench.ask(0)
        await bench.engine.started.get()
        gone = asyncio.create_task(
            bench.host.admit("m", 6).run(Elsewhere(6, 20, failure))  # more than one batch
        )
        mate = bench.ask(7)
        await asyncio.sleep(0)
        bench.engine.release()
        known = type(failure) if isinstance(failure, InvalidInput) else EngineFailure
        with pytest.raises(known):
            await gone
        assert (found(await first), found(await mate)) == ([0], [7])
        assert bench.host.queued_rows("m") == 0


async def test_calls_that_wait_travel_together_and_no_batch_exceeds_the_engine() -> None:
    async with hosting(Scripted(held=True)) as bench:
        calls = [bench.ask(0)]
        await bench.engine.started.get()
        calls += [bench.ask(n) for n in range(1, 7)]
        await asyncio.sleep(0)
        bench.engine.release()
        answers = await asyncio.gather(*calls)
        assert bench.engine.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [answer.batch_rows for answer in answers] == [(1,), *[(4,)] * 4, *[(2,)] * 2]


async def test_a_call_of_several_batches_is_answered_whole_and_in_order() -> None:
    async with hosting(Scripted(instances=2, held=True)) as bench:
        call = bench.ask(*range(10))
        await bench.engine.started.get()
        await bench.engine.started.get()
        bench.engine.release(last_first=True)
        answer = await call
        assert found(answer) == list(range(10))
        assert sum(answer.batch_rows) == 10


async def test_a_cancelled_caller_does_not_harm_its_batch_mates() -> None:
    async with hosting(Scripted(held=True)) as bench:
        calls = [bench.ask(9), *(bench.ask(n) for n in range(3))]
        await bench.engine.started.get()
        await asyncio.sleep(0)
        calls[1].cancel()
        bench.engine.release()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[1], asyncio.CancelledError)
        assert [found(answer) for answer in answers if isinstance(answer, ExecutionResult)] == [
            [9],
            [1],
            [2],
        ]
        assert bench.engine.batches[1] == [1, 2], "who left in time is not computed"


async def test_work_for_a_caller_that_left_too_late_is_counted_as_wasted() -> None:
    async with hosting(Scripted(held=True)) as bench:
        call = bench.ask(1)
        await bench.engine.started.get()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        bench.engine.release()
        await bench.ask(2)
        assert (bench.value("convserve_wasted_compute_seconds_total") or 0) > 0


async def test_a_failure_is_told_to_its_own_batch_and_the_next_one_runs() -> None:
    engine = Scripted()
    engine.failure = EngineFailure("it broke")
    async with hosting(engine) as bench:
        with pytest.raises(EngineFailure, match="it broke"):
            await bench.ask(*range(10))
        engine.failure = None
        assert found(await bench.ask(3)) == [3]
        assert bench.host.queued_rows("m") == 0


async def test_an_engine_that_can_not_even_start_fails_its_batch_only() -> None:
    engine = Scripted()
    engine.broken = True
    async with hosting(engine) as bench:
        with pytest.raises(EngineFailure):
            await bench.ask(1)
        engine.broken = False
        assert found(await bench.ask(2)) == [2]


async def test_a_full_queue_refuses_the_next_call() -> None:
    engine = Scripted(held=True)
    async with hosting(engine, DeadlineScheduler(1, 4)) as bench:
        calls = [bench.ask(0)]
        await engine.started.get()
        calls += [bench.ask(1, 2), bench.ask(3, 4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="queue holds at most 4"):
            await bench.ask(5)
        engine.release()
        assert [len(found(answer)) for answer in await asyncio.gather(*calls)] == [1, 2, 2]


async def test_a_call_that_became_hopeless_is_refused_with_a_hint_and_counted() -> None:
    engine = Scripted(held=True)
    async with hosting(engine) as bench:
        first = bench.ask(0)
        await engine.started.get()
        doomed = bench.ask(1, deadline_s=0.05)
        await asyncio.sleep(0.06)  # its deadline passes: that is what is tested
        engine.release()
        await first
        with pytest.raises(Overloaded) as refusal:
            await doomed
        assert refusal.value.retry_after_s > 0
        assert engine.batches == [[0]]
        assert bench.value("convserve_deadline_missed_total", stage="queue") == 1


async def test_removing_a_model_refuses_who_waits_answers_who_runs_and_closes() -> None:
    engine = Scripted(held=True)
    async with hosting(engine) as bench:
        runs = bench.ask(1)
        await engine.started.get()
        waits = bench.ask(2)
        await asyncio.sleep(0)
        removal = asyncio.create_task(bench.host.remove("m"))
        with pytest.raises(ModelNotReady):
            await waits
        assert not engine.closed
        engine.release()
        assert found(await runs) == [1]
        await removal
        assert engine.closed
        with pytest.raises(ModelNotReady):
            await bench.ask(3)


async def test_an_engine_is_closed_off_the_loop_and_none_of_it_is_kept() -> None:
    closing: list[tuple[int, bool]] = []

    class Heavy(Scripted):
        def close(self) -> None:
            super().close()
            instance = weakref.ref(self.instances[0])
            self.instances = []
            closing.append((threading.get_ident(), instance() is None))

    async with hosting(Heavy()) as bench:
        await bench.host.remove("m")
    ((thread, freed),) = closing
    assert thread != threading.get_ident()
    assert freed


async def test_a_place_that_was_taken_before_decoding_is_given_back() -> None:
    async with hosting(Scripted()) as bench:
        place = bench.host.admit("m", 3)
        assert bench.host.queued_rows("m") == 3
        place.release()
        place.release()
        assert bench.host.queued_rows("m") == 0
        place = bench.host.admit("m", 1)
        await bench.host.remove("m")
        with pytest.raises(ModelNotReady):
            await place.run(np.zeros((1, *SHAPE), np.uint8))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts take a batch for dead after 20 ms."""
    monkeypatch.setattr(running_batches, "STALL_S", 0.02)
    monkeypatch.setattr(running_batches, "STALL_FACTOR", 1)
    monkeypatch.setattr(device, "WATCH_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_stopped_answering_is_given_up_and_nobody_waits_for_it() -> None:
    engine = Scripted(held=True)
    async with hosting(engine, watch=True) as bench:
        runs = bench.ask(1)
        await engine.started.get()
        waits = [bench.ask(2), bench.ask(3)]
        with pytest.raises(EngineFailure, match="has not finished"):
            await runs
        for call in waits:
            with pytest.raises(ModelNotReady, match="has failed"):
                await call
        assert len(bench.failures) == 1
        with pytest.raises(ModelNotReady):
            await bench.ask(4)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_stopped_answering_does_not_hold_up_its_removal() -> None:
    engine = Scripted(held=True)
    async with hosting(engine, watch=True) as bench:
        runs = bench.ask(1)
        await engine.started.get()
        removal = asyncio.create_task(bench.host.remove("m"))
        with pytest.raises(EngineFailure, match="has not finished"):
            await runs
        await removal
        assert not engine.closed  # something may still run in it


async def test_a_lost_device_fails_what_runs_there_and_gives_up_all_its_engines_at_once() -> None:
    lost, neighbour = Scripted(held=True), Scripted(held=True)
    lost.failure = DeviceLost("CUDA: cudaErrorIllegalAddress")
    failures: list[str] = []
    async with hosting(lost) as bench:
        profile = profile_groups(neighbour, lambda instance, rows: 0.001)
        metrics = Metrics().model("n")
        bench.host.add("n", neighbour, profile, metrics, failures.append, objective_s=1.0)
        runs = bench.ask(1)
        await lost.started.get()
        waits = bench.ask(2)
        place = bench.host.admit("n", 1)
        lost.release()
        with pytest.raises(DeviceLost):
            await runs
        with pytest.raises(ModelNotReady, match="the device scripted is lost"):
            await waits
        with pytest.raises(ModelNotReady):
            await place.run(np.zeros((1, *SHAPE), np.uint8))
        with pytest.raises(ModelNotReady):
            bench.host.admit("n", 1)
    (why,) = bench.failures
    assert "is lost: CUDA: cudaErrorIllegalAddress; restart the server" in why
    assert failures == [why]


async def test_rows_that_are_computed_for_nobody_are_counted() -> None:
    class Filling(Scripted):
        def computed_rows(self, rows: int) -> int:
            return 4

    async with hosting(Filling()) as bench:
        await bench.ask(1, 2, 3)
        assert bench.value("convserve_padded_rows_total") == 1


async def test_a_device_is_busy_as_long_as_a_batch_runs() -> None:
    engine = Scripted(instances=2, held=True)
    async with hosting(engine, watch=True) as bench:
        await asyncio.sleep(0)
        call = bench.ask(1)
        await engine.started.get()
        began_s = clock()
        while clock() < began_s + 0.05:
            await asyncio.sleep(0.01)
        assert 0.3 < bench.host.busy_ratio() <= 0.55  # one of two units
        engine.release()
        await call


def test_the_way_back_is_the_mean_and_four_times_its_spread() -> None:
    response_delay = ResponseDelayEstimator()
    assert response_delay.batch_deadline_s(1.0, 0.0) == 1.0 - ResponseDelayEstimator.WIRE_S
    for _ in range(200):
        response_delay.record(0.002, 0.0)
    assert 1.0 - response_delay.batch_deadline_s(1.0, 0.0) == pytest.approx(0.003, abs=1e-4)
    response_delay.record(0.010, 0.0)
    assert 1.0 - response_delay.batch_deadline_s(1.0, 0.0) > 0.006
    assert response_delay.batch_deadline_s(math.inf, 0.0) == math.inf
    assert response_delay.batch_deadline_s(-0.5, 0.0) == -0.5  # it has passed


def test_a_way_back_that_was_long_once_does_not_shut_the_door_for_good() -> None:
    """After a hiccup of 50 ms calls with 20 ms are let in again, and so it is seen to be over."""
    response_delay = ResponseDelayEstimator()
    for _ in range(200):
        response_delay.record(0.050, 0.0)
    assert response_delay.batch_deadline_s(0.020, 0.0) == pytest.approx(
        0.010
    )  # half of what it has
    assert response_delay.batch_deadline_s(1.0, 0.0) == pytest.approx(1.0 - 0.051, abs=1e-3)
    later_s = 6 * ResponseDelayEstimator.HALF_LIFE_S
    assert response_delay.batch_deadline_s(later_s + 1.0, later_s) == pytest.approx(
        later_s + 0.998, abs=1e-3
    )


async def test_an_answer_is_planned_to_be_done_before_its_way_back() -> None:
    engine = Scripted(held=True)
    async with hosting(engine) as bench:
        for _ in range(200):
            bench.host.response_delay.record(0.050, clock())
        with pytest.raises(DeadlineUnreachable):
            await bench.ask(1, deadline_s=0.0019)  # a batch takes 1 ms
