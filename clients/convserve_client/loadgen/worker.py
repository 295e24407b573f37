"""Worker: one process's part of the load, from preparing the requests to its result."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import AnswerTotals, ProtocolAdapter
from convserve_client.loadgen.protocols.selection import adapter_for
from convserve_client.loadgen.run import Run
from convserve_client.loadgen.wire.channel import Channel


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """Results of one worker."""

    packed_samples: bytes  # of its Samples
    totals: AnswerTotals
    cpu_s: float  # of the worker, from the end of the warm-up to the end of the measurement
    ended_s: float  # when it stopped sending
    request_bytes: float  # mean size of the prepared requests
    connections: int  # at most at one time


async def run_worker(
    plan: Plan,
    index: int,
    workers: int,
    *,
    wait_for_start: Callable[[], Awaitable[float]],
    on_run: Callable[[Run], None],
    stop: asyncio.Event,
) -> WorkerResult:
    """Sends the load of worker `index`. All workers together send the load of the plan.

    Prepares the requests and connects, then awaits `wait_for_start` for the run's start on
    `clock`, and passes the run to `on_run`. Ends early when `stop` is set. Raises what
    `ProtocolAdapter.prepare_requests` raises, and ServerUnreachable.
    """
    async with AsyncExitStack() as stack:
        adapter = adapter_for(plan)
        requests = [await adapter.prepare_requests(plan, one) for one in plan.classes]
        channels = await connect(plan, adapter, stack)
        stack.enter_context(_frozen_garbage_collector())
        run = Run(plan, channels, requests, adapter, zero_s=await wait_for_start())
        on_run(run)
        load = (
            run.open_loop(plan.due(index, workers), plan.until_s)
            if plan.concurrency is None
            else run.closed_loop(
                _share(plan.concurrency, index, workers),
                plan.class_indices(plan.seed + index),
                plan.until_s,
            )
        )
        cpu_s: list[float] = []
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(max(0.0, when_s - run.now_s()), lambda: cpu_s.append(_cpu_s()))
            for when_s in (plan.warmup_s, plan.until_s)
        ]
        try:
            await _run_until(load, stop)
        finally:
            for timer in timers:
                timer.cancel()
        cpu_s.append(_cpu_s())
        sizes = [len(message) for messages in requests for message in messages]
        return WorkerResult(
            packed_samples=run.samples.packed,
            totals=run.totals,
            cpu_s=cpu_s[1] - cpu_s[0] if len(cpu_s) > 1 else 0.0,
            ended_s=min(run.now_s(), plan.until_s),
            request_bytes=sum(sizes) / len(sizes),
            connections=sum(channel.max_connections_used for channel in channels),
        )


async def connect(plan: Plan, adapter: ProtocolAdapter, stack: AsyncExitStack) -> list[Channel]:
    """Opens the plan's connections; `stack` closes them. Raises ServerUnreachable."""
    if plan.channels is None:
        channels = [Channel(plan.target, adapter.method, plan.access)]
    else:
        channels = [
            Channel(plan.target, adapter.method, plan.access, max_connections=1)
            for _ in range(plan.channels)
        ]
    for channel in channels:
        stack.push_async_callback(channel.close)
    await asyncio.gather(*(channel.connect() for channel in channels))
    return channels


async def _run_until(load: Any, stop: asyncio.Event) -> None:
    """Runs `load` until it ends or `stop` is set. Raises the error of `load`."""
    sending = asyncio.create_task(load)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, sending):
            task.cancel()
        ended = await asyncio.gather(sending, return_exceptions=True)
    if isinstance(ended[0], Exception):  # CancelledError is not an Exception
        raise ended[0]


@contextmanager
def _frozen_garbage_collector() -> Iterator[None]:
    """Excludes existing objects from garbage collection during the run, to make it faster."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _share(callers: int, index: int, workers: int) -> int:
    return callers // workers + (index < callers % workers)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
