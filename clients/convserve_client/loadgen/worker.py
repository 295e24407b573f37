"""One process that sends: prepared requests at their due times, and what became of each.

A sender shares the machine with what it measures, so a call must cost it as little as can be:
requests are bytes that were serialised once, calls have no tasks, timers are the kernel's, results
are packed numbers.
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
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from convserve_client.loadgen.calls import (
    UNAVAILABLE,
    Call,
    Channel,
    clock,
    framed,
)
from convserve_client.loadgen.load import (
    NOT_SENT,
    OK,
    REFUSED,
    STATUSES,
    Samples,
)
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols import Asked, ServerSide, protocol

UNREACHABLE_PAUSE_S = 0.01  # asking a server that isn't there any faster tells nothing
RECENT = 10_000  # latencies kept for the progress shown


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
        self._armed = False
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
        self._armed = True
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
        self._armed = False
        self._ring()
        if not self._armed:  # else it has stopped ringing by itself
            os.read(self._fd, 8)


class Sends(Protocol):
    """Where calls go; see Channel."""

    def start(self, call: Call, body: bytes, timeout_s: float) -> None: ...

    def cancel(self, call: Call) -> None: ...


class Run:
    """Sends prepared requests and keeps what became of each. Lives in one event loop."""

    def __init__(
        self,
        plan: Plan,
        channels: Sequence[Sends],
        requests: Sequence[Sequence[bytes]],
        asked: Asked,
        *,
        zero_s: float,
    ) -> None:
        """`requests` are those of each kind of the plan; `zero_s` on `clock` is the run's 0."""
        self._plan = plan
        self._channels = itertools.cycle(channels)
        self._bodies = [itertools.cycle(map(framed, messages)) for messages in requests]
        self._read = asked.read
        self._zero_s = zero_s
        self._images = [kind.images for kind in plan.kinds]
        self._timeouts_s = plan.deadlines_s
        self._loop = asyncio.get_running_loop()
        self._asking: set[_Asking] = set()
        self._next: Callable[[int], None] = _nothing  # told of each status, when a call is over
        self.samples = Samples()
        self.server = ServerSide()
        self._progress = Progress()

    @property
    def in_flight(self) -> int:
        return len(self._asking)

    def now_s(self) -> float:
        return clock() - self._zero_s

    def progress(self) -> Progress:
        """What has happened since it was asked for last."""
        found, self._progress = self._progress, Progress()
        found.in_flight = self.in_flight
        return found

    async def closed_loop(self, callers: int, kinds: Iterator[int], until_s: float) -> None:
        """`callers`, each sending its next request when the last one ended."""
        all_left = asyncio.Event()
        left = 0

        def ask() -> None:
            nonlocal left
            due_s = self.now_s()
            if due_s < until_s:
                self._ask(due_s, next(kinds))
                return
            left += 1
            if left == callers:
                all_left.set()

        def go_on(code: int) -> None:
            if code == UNAVAILABLE:
                self._loop.call_later(UNREACHABLE_PAUSE_S, ask)
            else:
                ask()

        await asyncio.sleep(max(0.0, -self.now_s()))
        self._next = go_on
        try:
            for _ in range(callers):
                ask()
            if callers:
                await all_left.wait()
        finally:
            self._give_up()

    async def open_loop(self, due: Iterable[tuple[float, int]], until_s: float) -> None:
        """Sends each kind at its due time, whatever became of earlier requests."""
        arrivals = itertools.takewhile(lambda arrival: arrival[0] < until_s, due)
        following = next(arrivals, None)
        all_ended = asyncio.Event()

        def send() -> None:
            nonlocal following
            while following is not None and following[0] <= self.now_s():
                self._send(*following)
                following = next(arrivals, None)
            if following is not None:
                alarm.set(self._zero_s + following[0])
            elif not self._asking:
                all_ended.set()

        def go_on(code: int) -> None:
            if following is None and not self._asking:
                all_ended.set()

        self._next = go_on
        alarm = Alarm(send)
        try:
            if following is not None:
                alarm.set(self._zero_s + following[0])
                await all_ended.wait()
        finally:
            alarm.close()
            self._give_up()

    def _send(self, due_s: float, kind: int) -> None:
        if len(self._asking) < self._plan.max_in_flight:
            self._ask(due_s, kind)
            return
        now_s = self.now_s()
        self.samples.add(due_s, now_s, now_s, NOT_SENT, self._images[kind], kind)
        self._progress.failed += 1

    def _ask(self, due_s: float, kind: int) -> None:
        """One request, sampled however it ends."""
        asking = _Asking(self, next(self._channels), next(self._bodies[kind]), due_s, kind)
        self._asking.add(asking)
        asking.channel.start(asking, asking.body, self._timeouts_s[kind])

    def ended(self, asking: _Asking) -> None:
        """A try is over, and the request unless it is sent again."""
        status = STATUSES[asking.code]
        if status in REFUSED:
            asking.hint_s = hint_s = asking.hint()
            left_s = self._timeouts_s[asking.kind] - (self.now_s() - asking.due_s) - hint_s
            if self._plan.obey_hints and hint_s >= 0 and left_s > 0:
                asking.tries += 1
                asking.waiting = self._loop.call_later(hint_s, self._ask_again, asking, left_s)
                return
        rows = 0.0
        if status == OK:
            counted = asking.due_s >= self._plan.warmup_s
            try:
                rows = self._read(asking.answer, self.server if counted else ServerSide())
            except DecodeError:
                status = "INTERNAL"
        self._over(asking, status, rows)
        self._next(asking.code)

    def _ask_again(self, asking: _Asking, timeout_s: float) -> None:
        asking.waiting = None
        asking.channel = next(self._channels)
        asking.channel.start(asking, asking.body, timeout_s)

    def _give_up(self) -> None:
        """What is in flight is cancelled."""
        self._next = _nothing
        for asking in list(self._asking):
            if asking.waiting is not None:
                asking.waiting.cancel()
            else:
                asking.channel.cancel(asking)
            self._over(asking, "CANCELLED", 0.0)

    def _over(self, asking: _Asking, status: str, rows: float) -> None:
        self._asking.discard(asking)
        due_s, finished_s, kind = asking.due_s, self.now_s(), asking.kind
        self.samples.add(
            *(due_s, asking.sent_s, finished_s, status, self._images[kind], kind),
            *(asking.tries, asking.hint_s, rows),
        )
        progress = self._progress
        if status == OK:
            progress.answered += 1
            if len(progress.latencies_s) < RECENT:
                progress.latencies_s.append(finished_s - due_s)
        elif status in REFUSED:
            progress.refused += 1
        else:
            progress.failed += 1


class _Asking(Call):
    """A request of a run."""

    __slots__ = ("body", "channel", "due_s", "hint_s", "kind", "run", "sent_s", "tries", "waiting")

    def __init__(self, run: Run, channel: Sends, body: bytes, due_s: float, kind: int) -> None:
        super().__init__()
        self.run = run
        self.channel = channel
        self.body = body
        self.due_s = due_s
        self.sent_s = run.now_s()
        self.kind = kind
        self.tries = 1
        self.hint_s = -1.0
        self.waiting: asyncio.TimerHandle | None = None  # for the time that a refusal asked for

    def ended(self) -> None:
        self.run.ended(self)


def _nothing(code: int) -> None:
    pass


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
        channels = await connected(plan, asked, stack)
        stack.enter_context(_quiet_collector())
        run = Run(plan, channels, requests, asked, zero_s=await start())
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


async def connected(plan: Plan, asked: Asked, stack: AsyncExitStack) -> list[Channel]:
    """The plan's connections; `stack` closes them. Raises ServerUnreachable."""
    channels = [Channel(plan.target, asked.method) for _ in range(plan.channels)]
    for channel in channels:
        stack.push_async_callback(channel.close)
    await asyncio.gather(*(channel.connect() for channel in channels))
    return channels


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


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
