"""Failed batches, stalled engines, and lost devices."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.errors import DeviceLost, EngineFailure, ModelNotReady
from server.execution import device, running_batches
from server.execution.device import profile_groups
from server.telemetry.metrics import Metrics
from tests.execution.scripted_engine import SHAPE, ScriptedEngine, classes_of, executing


async def test_a_failed_batch_fails_its_requests_and_the_next_batch_runs() -> None:
    engine = ScriptedEngine()
    engine.failure = EngineFailure("it broke")
    async with executing(engine) as bench:
        with pytest.raises(EngineFailure, match="it broke"):
            await bench.submit(*range(10))
        engine.failure = None
        assert classes_of(await bench.submit(3)) == [3]
        assert bench.executor.queued_rows("m") == 0


async def test_a_batch_that_cannot_start_fails_and_the_next_batch_runs() -> None:
    engine = ScriptedEngine()
    engine.raises_at_start = True
    async with executing(engine) as bench:
        with pytest.raises(EngineFailure):
            await bench.submit(1)
        engine.raises_at_start = False
        assert classes_of(await bench.submit(2)) == [2]


@pytest.fixture
def short_stall_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches stall after 20 ms."""
    monkeypatch.setattr(running_batches, "STALL_S", 0.02)
    monkeypatch.setattr(running_batches, "STALL_FACTOR", 1)
    monkeypatch.setattr(device, "WATCH_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("short_stall_limit")
async def test_a_stalled_engine_fails_its_running_and_queued_requests() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine, watch=True) as bench:
        running = bench.submit(1)
        await engine.started.get()
        queued = [bench.submit(2), bench.submit(3)]
        with pytest.raises(EngineFailure, match="has not finished"):
            await running
        for request in queued:
            with pytest.raises(ModelNotReady, match="has failed"):
                await request
        assert len(bench.failures) == 1
        with pytest.raises(ModelNotReady):
            await bench.submit(4)


@pytest.mark.usefixtures("short_stall_limit")
async def test_a_stalled_engine_does_not_block_its_removal() -> None:
    engine = ScriptedEngine(held=True)
    async with executing(engine, watch=True) as bench:
        running = bench.submit(1)
        await engine.started.get()
        removal = asyncio.create_task(bench.executor.remove("m"))
        with pytest.raises(EngineFailure, match="has not finished"):
            await running
        await removal
        assert not engine.closed  # a batch may still run


async def test_a_lost_device_fails_all_its_engines_and_their_requests() -> None:
    lost, neighbour = ScriptedEngine(held=True), ScriptedEngine(held=True)
    lost.failure = DeviceLost("CUDA: cudaErrorIllegalAddress")
    failures: list[str] = []
    async with executing(lost) as bench:
        groups = profile_groups(neighbour, lambda instance, rows: 0.001)
        metrics = Metrics().model("n")
        bench.executor.add("n", neighbour, groups, metrics, failures.append, objective_s=1.0)
        running = bench.submit(1)
        await lost.started.get()
        queued = bench.submit(2)
        reservation = bench.executor.admit("n", 1)
        lost.release()
        with pytest.raises(DeviceLost):
            await running
        with pytest.raises(ModelNotReady, match="the device scripted is lost"):
            await queued
        with pytest.raises(ModelNotReady):
            await reservation.run(np.zeros((1, *SHAPE), np.uint8))
        with pytest.raises(ModelNotReady):
            bench.executor.admit("n", 1)
    (reason,) = bench.failures
    assert "is lost: CUDA: cudaErrorIllegalAddress; restart the server" in reason
    assert failures == [reason]
