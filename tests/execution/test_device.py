"""The device executor answers every admitted request exactly once, with its own rows."""

from __future__ import annotations

import asyncio
import threading
import weakref

import numpy as np
import pytest

from server.engines.base import RowSource
from server.errors import (
    DeadlineUnreachable,
    EngineFailure,
    InvalidInput,
    ModelNotReady,
    Overloaded,
)
from server.execution.device import profile_groups
from server.execution.pending_request import ExecutionResult
from server.images.input_spec import Pixels
from server.scheduling.deadline import DeadlineScheduler
from server.telemetry.clock import clock
from tests.execution.scripted_engine import SHAPE, ScriptedEngine, classes_of, executing


async def test_every_caller_gets_its_own_rows() -> None:
    async with executing(ScriptedEngine(instances=2)) as bench:
        results = await asyncio.gather(*(bench.submit(n, n + 1) for n in range(30)))
        assert [classes_of(result) for result in results] == [[n, n + 1] for n in range(30)]


class LazyRows(RowSource):
    """Rows of the classes from `first_class` on. Records the targets of its copies, or fails."""

    def __init__(self, count: int, first_class: int, failure: Exception | None = None) -> None:
        self.targets: list[Pixels] = []
        self._count, self._first_class, self._failure = count, first_class, failure

    def __len__(self) -> int:
        return self._count

    def copy_into(self, target: Pixels, first: int) -> None:
        if self._failure is not None:
            raise self._failure
        self.targets.append(target)
        start = self._first_class + first
        target[:, 0, 0, 0] = range(start, start + len(target))


async def test_a_row_source_is_copied_directly_into_the_batch() -> None:
    async with executing(ScriptedEngine()) as bench:
        rows = LazyRows(6, 20)
        reservation = bench.executor.admit("m", 6)
        assert classes_of(await reservation.run(rows)) == [20, 21, 22, 23, 24, 25]
        memory = [instance.pixels for instance in bench.engine.instances]
        for target in rows.targets:
            assert any(np.shares_memory(target, pixels) for pixels in memory)


@pytest.mark.parametrize("failure", [InvalidInput("region", "is gone"), OSError("broken")])
async def test_a_failing_row_source_fails_only_its_own_request(failure: Exception) -> None:
    async with executing(ScriptedEngine(held=True)) as bench:
        first = bench.submit(0)
        await bench.engine.started.get()
        rows = LazyRows(6, 20, failure)  # more than one batch
        failing = asyncio.create_task(bench.executor.admit("m", 6).run(rows))
        other = bench.submit(7)
        await asyncio.sleep(0)
        bench.engine.release()
        expected = InvalidInput if isinstance(failure, InvalidInput) else EngineFailure
        with pytest.raises(expected):
            await failing
        assert (classes_of(await first), classes_of(await other)) == ([0], [7])
        assert bench.executor.queued_rows("m") == 0


async def test_queued_requests_share_batches_up_to_the_engines_limit() -> None:
    async with executing(ScriptedEngine(held=True)) as bench:
        requests = [bench.submit(0)]
        await bench.engine.started.get()
        requests += [bench.submit(n) for n in range(1, 7)]
        await asyncio.sleep(0)
        bench.engine.release()
        results = await asyncio.gather(*requests)
        assert bench.engine.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [result.batch_rows for result in results] == [(1,), *[(4,)] * 4, *[(2,)] * 2]


async def test_a_request_in_several_batches_gets_its_rows_in_order() -> None:
    async with executing(ScriptedEngine(instances=2, held=True)) as bench:
        request = bench.submit(*range(10))
        await bench.engine.started.get()
        await bench.engine.started.get()
        bench.engine.release(last_first=True)
        result = await request
        assert classes_of(result) == list(range(10))
        assert sum(result.batch_rows) == 10


async def test_a_cancelled_caller_does_not_affect_other_requests() -> None:
    async with executing(ScriptedEngine(held=True)) as bench:
        requests = [bench.submit(9), *(bench.submit(n) for n in range(3))]
        await bench.engine.started.get()
        await asyncio.sleep(0)
        requests[1].cancel()
        bench.engine.release()
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        others = [result for result in results if isinstance(result, ExecutionResult)]
        assert [classes_of(result) for result in others] == [[9], [1], [2]]
        assert bench.engine.batches[1] == [1, 2], "the cancelled request does not run"


async def test_compute_for_a_cancelled_caller_is_counted_as_wasted() -> None:
    async with executing(ScriptedEngine(held=True)) as bench:
        request = bench.submit(1)
        await bench.engine.started.get()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        bench.engine.release()
        await bench.submit(2)
        assert (bench.value("convserve_wasted_compute_seconds_total") or 0) > 0


async def test_a_full_queue_refuses_the_next_request() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine, DeadlineScheduler(1, 4)) as bench:
        requests = [bench.submit(0)]
        await engine.started.get()
        requests += [bench.submit(1, 2), bench.submit(3, 4)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="queue holds at most 4"):
            await bench.submit(5)
        engine.release()
        results = await asyncio.gather(*requests)
        assert [len(classes_of(result)) for result in results] == [1, 2, 2]


async def test_an_expired_request_fails_with_a_retry_time_and_is_counted() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine) as bench:
        first = bench.submit(0)
        await engine.started.get()
        expiring = bench.submit(1, deadline_s=0.05)
        await asyncio.sleep(0.06)  # until its deadline has passed
        engine.release()
        await first
        with pytest.raises(Overloaded) as refusal:
            await expiring
        assert refusal.value.retry_after_s > 0
        assert engine.batches == [[0]]
        assert bench.value("convserve_deadline_missed_total", stage="queue") == 1


async def test_a_reservation_can_be_released_before_decoding() -> None:
    async with executing(ScriptedEngine()) as bench:
        reservation = bench.executor.admit("m", 3)
        assert bench.executor.queued_rows("m") == 3
        reservation.release()
        reservation.release()
        assert bench.executor.queued_rows("m") == 0
        reservation = bench.executor.admit("m", 1)
        await bench.executor.remove("m")
        with pytest.raises(ModelNotReady):
            await reservation.run(np.zeros((1, *SHAPE), np.uint8))


async def test_padded_rows_are_counted() -> None:
    class PaddingEngine(ScriptedEngine):
        def computed_rows(self, rows: int) -> int:
            return 4

    async with executing(PaddingEngine()) as bench:
        await bench.submit(1, 2, 3)
        assert bench.value("convserve_padded_rows_total") == 1


async def test_the_busy_ratio_counts_running_batches() -> None:
    engine = ScriptedEngine(instances=2, held=True)
    async with executing(engine, watch=True) as bench:
        await asyncio.sleep(0)
        request = bench.submit(1)
        await engine.started.get()
        start_s = clock()
        while clock() < start_s + 0.05:
            await asyncio.sleep(0.01)
        assert 0.3 < bench.executor.busy_ratio() <= 0.55  # one of two units
        engine.release()
        await request


async def test_admission_subtracts_the_response_delay_from_the_deadline() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine) as bench:
        for _ in range(200):
            bench.executor.response_delay.record(0.050, clock())
        with pytest.raises(DeadlineUnreachable):
            await bench.submit(1, deadline_s=0.0019)  # a batch takes 1 ms


async def test_removing_a_model_rejects_queued_requests_and_finishes_running_ones() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine) as bench:
        running = bench.submit(1)
        await engine.started.get()
        queued = bench.submit(2)
        await asyncio.sleep(0)
        removal = asyncio.create_task(bench.executor.remove("m"))
        with pytest.raises(ModelNotReady):
            await queued
        assert not engine.closed
        engine.release()
        assert classes_of(await running) == [1]
        await removal
        assert engine.closed
        with pytest.raises(ModelNotReady):
            await bench.submit(3)


async def test_a_request_that_is_decoded_while_its_model_is_loaded_again_changes_no_queue() -> None:
    async with executing(ScriptedEngine()) as bench:
        reservation = bench.executor.admit("m", 3)
        await bench.executor.remove("m")
        again = ScriptedEngine()
        bench.executor.add(
            "m",
            again,
            profile_groups(again, lambda instance, rows: 0.001),
            bench.metrics.model("m"),
            on_engine_failed=bench.failures.append,
            objective_s=10.0,
        )
        reservation.release()
        assert bench.executor.queued_rows("m") == 0
        assert classes_of(await bench.submit(4)) == [4]


async def test_an_engine_is_closed_in_a_thread_and_its_instances_are_freed() -> None:
    closing: list[tuple[int, bool]] = []

    class ObservedEngine(ScriptedEngine):
        def close(self) -> None:
            super().close()
            instance = weakref.ref(self.instances[0])
            self.instances = []
            closing.append((threading.get_ident(), instance() is None))

    async with executing(ObservedEngine()) as bench:
        await bench.executor.remove("m")
    ((thread, freed),) = closing
    assert thread != threading.get_ident()
    assert freed
