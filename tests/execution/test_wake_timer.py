"""The timer for the scheduler's next wake-up."""

from __future__ import annotations

import asyncio

from server.execution.wake_timer import WakeTimer
from server.telemetry.clock import clock


async def test_the_timer_fires_once_at_the_earliest_time() -> None:
    fired = asyncio.Queue[float]()
    timer = WakeTimer(lambda: fired.put_nowait(clock()))
    now_s = clock()
    timer.set(now_s + 3600, now_s)
    timer.set(now_s + 0.01, now_s)
    timer.set(now_s + 60, now_s)
    async with asyncio.timeout(30):
        assert await fired.get() < now_s + 30
    assert fired.empty()
    timer.cancel()
