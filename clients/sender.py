"""One process that sends: prepared requests at their due times, and what became of each.

A sender shares the machine with what it measures, so a call must cost it as little as can be:
requests are bytes that were serialised once, timers are the kernel's, results are packed numbers.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from clients.client import MAX_MESSAGE_BYTES, ServerUnreachable, channel_options, translated
from clients.load import NOT_SENT, OK, REFUSED, Samples
from clients.plan import Plan
from clients.protocols import Asked, ServerSide, protocol

UNREACHABLE_PAUSE_S = 0.01  # asking a server that isn't there any faster tells nothing
CONNECT_S = 10.0
RECENT = 10_000  # latencies kept for the progress shown

Rpc = Callable[..., Awaitable[Any]]

clock = time.monotonic  # the same for all processes of a machine


@dataclass(slots=True)
class Progress:
    """What has happened since the progress before it."""

    in_flight: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def add(self, other: Progress) -> None:
        self.in_flight += other.in_flight
        self.answered += other.answered
        self.refused += other.refused
        self.failed += other.failed
        self.latencies_s += other.latencies_s


@dataclass(frozen=True, slots=True)
class Part:
    """What one sender has found."""

    packed: bytes  # of its Samples
    server: ServerSide
    cpu_s: float  # its own, from the end of the warm-up to the end of the measurement
    ended_s: float  # when it stopped sending
    request_bytes: float  # of a request, mean over kinds and requests


class Alarm:
    """Calls back at given times, to some 50 us: event loops' own timers tick in milliseconds.

    Belongs to one event loop. `close` it.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._handle: asyncio.TimerHandle | None = None
        if sys.platform == "linux":  # elsewhere the loop's timers have to do
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            self._loop.add_reader(self._fd, self._rung)
        # struct itimerspec: the interval and the time, seconds and nanoseconds each
        self._spec = (ctypes.c_long * 4)()

    def set(self, when_s: float) -> None:
        """The next ring is at `when_s` on `clock`; a time that has passed rings at once."""
        if self._fd < 0:
            self._handle = self._loop.call_later(max(0.0, when_s - clock()), self._ring)
            return
        seconds = int(when_s)
        self._spec[2] = seconds
        self._spec[3] = max(1, int((when_s - seconds) * 1e9))  # all zero would disarm it
        absolute = 1
        self._libc.timerfd_settime(self._fd, absolute, self._spec, None)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _rung(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew meanwhile
            return
        self._ring()


class Run:
    """Sends prepared requests and keeps what became of each. Lives in one event loop."""

    def __init__(
        self,
        plan: Plan,
        rpcs: Sequence[Rpc],
        requests: Sequence[Sequence[bytes]],
        asked: Asked,
        *,
        zero_s: float,
    ) -> None:
        """`requests` are those of each kind of the plan; `zero_s` on `clock` is the run's 0."""
        self._plan = plan
        self._rpcs = itertools.cycle(rpcs)
        self._requests = [itertools.cycle(messages) for messages in requests]
        self._read = asked.read
        self._zero_s = zero_s
        self._images = [kind.images for kind in plan.kinds]
        self._timeouts_s = plan.deadlines_s
        self.in_flight = 0
        self.samples = Samples()
        self.server = ServerSide()
        self._progress = Progress()

    def now_s(self) -> float:
        return clock() - self._zero_s

    def progress(self) -> Progress:
        """What has happened since it was asked for last."""
        found, self._progress = self._progress, Progress()
        found.in_flight = self.in_flight
        return found

    async def closed_loop(self, callers: int, kinds: Iterator[int], until_s: float) -> None:
        """`callers`, each sending its next request when the last one ended."""

        async def caller() -> None:
            while (due_s := self.now_s()) < until_s:
                self.in_flight += 1
                if await self._ask(due_s, next(kinds)) == "UNAVAILABLE":
                    await asyncio.sleep(UNREACHABLE_PAUSE_S)

        await asyncio.sleep(max(0.0, -self.now_s()))
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller())

    async def open_loop(self, due: Iterable[tuple[float, int]], until_s: float) -> None:
        """Sends each kind at its due time, whatever became of earlier requests."""
        arrivals = itertools.takewhile(lambda arrival: arrival[0] < until_s, due)
        following = next(arrivals, None)
        if following is None:
            return
        all_sent = asyncio.Event()
        async with asyncio.TaskGroup() as asking:

            def send() -> None:
                nonlocal following
                while following is not None and following[0] <= self.now_s():
                    self._send(asking, *following)
                    following = next(arrivals, None)
                if following is None:
                    all_sent.set()
                else:
                    alarm.set(self._zero_s + following[0])

            alarm = Alarm(send)
            try:
                alarm.set(self._zero_s + following[0])
                await all_sent.wait()
            finally:
                alarm.close()

    def _send(self, asking: asyncio.TaskGroup, due_s: float, kind: int) -> None:
        if self.in_flight < self._plan.max_in_flight:
            self.in_flight += 1
            asking.create_task(self._ask(due_s, kind))
            return
        now_s = self.now_s()
        self.samples.add(due_s, now_s, now_s, NOT_SENT, self._images[kind], kind)
        self._progress.failed += 1

    async def _ask(self, due_s: float, kind: int) -> str:
        """One request, sampled however it ends; returns its status. It is in flight already."""
        sent_s = self.now_s()
        status, hint_s, tries, rows = "CANCELLED", -1.0, 0, 0.0
        request, timeout_s = next(self._requests[kind]), self._timeouts_s[kind]
        try:
            while True:
                tries += 1
                try:
                    answer = await next(self._rpcs)(request, timeout=timeout_s)
                except grpc.aio.AioRpcError as failure:
                    status = failure.code().name
                    if status in REFUSED:
                        hint_s = _hint_s(failure)
                        timeout_s = self._timeouts_s[kind] - (self.now_s() - due_s) - hint_s
                        if self._plan.obey_hints and hint_s >= 0 and timeout_s > 0:
                            status = "CANCELLED"  # should that happen while it waits
                            await asyncio.sleep(hint_s)
                            continue
                else:
                    # grpcio gives None now and then where the deadline passed as the answer came
                    # (1.78).
                    status = OK if answer is not None else "DEADLINE_EXCEEDED"
                    if status == OK:
                        counted = due_s >= self._plan.warmup_s
                        rows = self._read(answer, self.server if counted else ServerSide())
                return status
        finally:
            self.in_flight -= 1
            finished_s = self.now_s()
            self.samples.add(
                *(due_s, sent_s, finished_s, status, self._images[kind], kind),
                *(tries, hint_s, rows),
            )
            self._note(status, finished_s - due_s)

    def _note(self, status: str, latency_s: float) -> None:
        progress = self._progress
        if status == OK:
            progress.answered += 1
            if len(progress.latencies_s) < RECENT:
                progress.latencies_s.append(latency_s)
        elif status in REFUSED:
            progress.refused += 1
        else:
            progress.failed += 1


async def send_part(
    plan: Plan,
    index: int,
    of: int,
    *,
    start: Callable[[], Awaitable[float]],
    running: Callable[[Run], None],
    stop: asyncio.Event,
) -> Part:
    """The `index`-th of `of` parts of the plan's load; together they are the plan's.

    Prepares and connects, then awaits `start` for the moment on `clock` that is the run's 0, and
    tells `running`. Ends early once `stop` is set. Raises what `Asked.prepared` does, and
    ServerUnreachable.
    """
    async with AsyncExitStack() as stack:
        asked = protocol(plan)
        requests = [await asked.prepared(plan, kind) for kind in plan.kinds]
        rpcs = await connected(plan, asked, stack)
        stack.enter_context(_quiet_collector())
        run = Run(plan, rpcs, requests, asked, zero_s=await start())
        running(run)
        load = (
            run.open_loop(plan.due(index, of), plan.until_s)
            if plan.concurrency is None
            else run.closed_loop(
                _share(plan.concurrency, index, of), plan.chosen(plan.seed + index), plan.until_s
            )
        )
        cpu_s: list[float] = []
        loop = asyncio.get_running_loop()
        marks = [
            loop.call_later(max(0.0, when_s - run.now_s()), lambda: cpu_s.append(_cpu_s()))
            for when_s in (plan.warmup_s, plan.until_s)
        ]
        try:
            await _until_stopped(load, stop)
        finally:
            for mark in marks:
                mark.cancel()
        cpu_s.append(_cpu_s())
        sizes = [len(message) for messages in requests for message in messages]
        return Part(
            packed=run.samples.packed,
            server=run.server,
            cpu_s=cpu_s[1] - cpu_s[0] if len(cpu_s) > 1 else 0.0,
            ended_s=min(run.now_s(), plan.until_s),
            request_bytes=sum(sizes) / len(sizes),
        )


async def connected(plan: Plan, asked: Asked, stack: AsyncExitStack) -> list[Rpc]:
    """The call on each of the plan's connections; `stack` closes them. Raises ServerUnreachable."""
    options = [
        *channel_options(MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),  # else channels to one target share one connection
    ]
    channels = [
        await stack.enter_async_context(grpc.aio.insecure_channel(plan.target, options=options))
        for _ in range(plan.channels)
    ]
    try:
        async with asyncio.timeout(CONNECT_S):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
    except TimeoutError:
        raise ServerUnreachable(
            f"{plan.target} took no further connections within {CONNECT_S:g} s"
        ) from None
    rpcs: list[Any] = [channel.unary_unary(asked.method, None, asked.parse) for channel in channels]
    return rpcs


async def _until_stopped(load: Any, stop: asyncio.Event) -> None:
    sending = asyncio.create_task(load)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, sending):
            task.cancel()
        ended = await asyncio.gather(sending, return_exceptions=True)
    if isinstance(ended[0], Exception):  # a cancellation is none
        raise ended[0]


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """What is there before the run is not looked at again and again for garbage."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _share(callers: int, index: int, of: int) -> int:
    return callers // of + (index < callers % of)


def _hint_s(failure: grpc.aio.AioRpcError) -> float:
    """The wait that a refusal asks for; -1 where it asks for none, or for no further try."""
    trailing: Any = failure.trailing_metadata() or ()
    for key, value in trailing:
        if key == "grpc-retry-pushback-ms":  # cheaper to read than a google.rpc.RetryInfo
            text = value if isinstance(value, str) else value.decode("latin-1")
            return int(text) / 1000 if text.isascii() and text.isdigit() else -1.0
    hint_s = translated(failure, connected=True).retry_after_s
    return -1.0 if hint_s is None or hint_s == float("inf") else hint_s


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
