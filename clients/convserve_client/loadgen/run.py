"""Run of one worker: sends prepared requests at their due times and records every outcome.

The load generator shares the machine with the server, so a request must be cheap. Requests are
serialised once, calls have no tasks, timers are the kernel's, and samples are packed numbers.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from convserve_client.loadgen.event_loop import PreciseTimer, clock
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import AnswerTotals, ProtocolAdapter
from convserve_client.loadgen.results.samples import NOT_SENT, OK, REFUSED, STATUSES, Samples
from convserve_client.loadgen.wire.call import UNAVAILABLE, UnaryCall, framed

UNREACHABLE_PAUSE_S = 0.01  # before the next request to a server that is unreachable
MAX_RECENT_LATENCIES = 10_000  # kept for the progress display


@dataclass(slots=True)
class Progress:
    """Counts of requests since the previous report of progress."""

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


class CallSender(Protocol):
    """Sends calls; see `Channel`."""

    def start(self, call: UnaryCall, body: bytes, timeout_s: float) -> None: ...

    def cancel(self, call: UnaryCall) -> None: ...


class Run:
    """Sends prepared requests and records their outcomes. Belongs to one event loop."""

    def __init__(
        self,
        plan: Plan,
        channels: Sequence[CallSender],
        requests: Sequence[Sequence[bytes]],
        adapter: ProtocolAdapter,
        *,
        zero_s: float,
    ) -> None:
        """`requests` has the messages of each request class. The run starts at `zero_s`."""
        self._plan = plan
        self._channels = itertools.cycle(channels)
        self._bodies = [itertools.cycle(map(framed, messages)) for messages in requests]
        self._read_answer = adapter.read_answer
        self._zero_s = zero_s
        self._images = [request_class.images for request_class in plan.classes]
        self._timeouts_s = plan.deadlines_s
        self._loop = asyncio.get_running_loop()
        self._requests: set[_Request] = set()  # in flight
        self._on_end: Callable[[int], None] = _ignore  # gets the status of each ended request
        self.samples = Samples()
        self.totals = AnswerTotals()
        self._progress = Progress()

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def now_s(self) -> float:
        return clock() - self._zero_s

    def progress(self) -> Progress:
        """The counts since the previous call of this method."""
        found, self._progress = self._progress, Progress()
        found.in_flight = self.in_flight
        return found

    async def closed_loop(self, callers: int, classes: Iterator[int], until_s: float) -> None:
        """Runs callers. Each one sends its next request when its previous one has ended."""
        all_done = asyncio.Event()
        done = 0

        def send_next() -> None:
            nonlocal done
            due_s = clock() - self._zero_s
            if due_s < until_s:
                self._start(due_s, next(classes), due_s)
                return
            done += 1
            if done == callers:
                all_done.set()

        def on_end(code: int) -> None:
            if code == UNAVAILABLE:
                self._loop.call_later(UNREACHABLE_PAUSE_S, send_next)
            else:
                send_next()

        await asyncio.sleep(max(0.0, -self.now_s()))
        self._on_end = on_end
        try:
            for _ in range(callers):
                send_next()
            if callers:
                await all_done.wait()
        finally:
            self._cancel_all()

    async def open_loop(self, due: Iterable[tuple[float, int]], until_s: float) -> None:
        """Sends each request at its due time, whatever happens to earlier ones."""
        arrivals = itertools.takewhile(lambda arrival: arrival[0] < until_s, due)
        upcoming = next(arrivals, None)
        all_ended = asyncio.Event()

        def send_due() -> None:
            nonlocal upcoming
            while upcoming is not None and upcoming[0] <= (now_s := clock() - self._zero_s):
                self._start_or_skip(*upcoming, now_s)
                upcoming = next(arrivals, None)
            if upcoming is not None:
                timer.set(self._zero_s + upcoming[0])
            elif not self._requests:
                all_ended.set()

        def on_end(code: int) -> None:
            if upcoming is None and not self._requests:
                all_ended.set()

        self._on_end = on_end
        timer = PreciseTimer(send_due)
        try:
            if upcoming is not None:
                timer.set(self._zero_s + upcoming[0])
                await all_ended.wait()
        finally:
            timer.close()
            self._cancel_all()

    def _start_or_skip(self, due_s: float, class_index: int, now_s: float) -> None:
        if len(self._requests) < self._plan.max_in_flight:
            self._start(due_s, class_index, now_s)
            return
        self.samples.add(due_s, now_s, now_s, NOT_SENT, self._images[class_index], class_index)
        self._progress.failed += 1

    def _start(self, due_s: float, class_index: int, sent_s: float) -> None:
        """Sends one request. It gives exactly one sample."""
        body = next(self._bodies[class_index])
        request = _Request(self, next(self._channels), body, due_s, sent_s, class_index)
        self._requests.add(request)
        request.channel.start(request, body, self._timeouts_s[class_index])

    def call_ended(self, request: _Request) -> None:
        """Records a request whose call has ended, or sends it again."""
        status = STATUSES[request.code]
        if status in REFUSED:
            request.wait_s = wait_s = request.retry_after_s()
            elapsed_s = self.now_s() - request.due_s
            left_s = self._timeouts_s[request.class_index] - elapsed_s - wait_s
            if self._plan.obey_retry_after and wait_s >= 0 and left_s > 0:
                request.tries += 1
                request.retry_timer = self._loop.call_later(wait_s, self._retry, request, left_s)
                return
        rows = 0.0
        if status == OK:
            is_measured = request.due_s >= self._plan.warmup_s
            totals = self.totals if is_measured else AnswerTotals()
            try:
                rows = self._read_answer(request.answer, totals)
            except DecodeError:
                status = "INTERNAL"
        self._record(request, status, rows)
        self._on_end(request.code)

    def _retry(self, request: _Request, timeout_s: float) -> None:
        request.retry_timer = None
        request.channel = next(self._channels)
        request.channel.start(request, request.body, timeout_s)

    def _cancel_all(self) -> None:
        self._on_end = _ignore
        for request in list(self._requests):
            if request.retry_timer is not None:
                request.retry_timer.cancel()
            else:
                request.channel.cancel(request)
            self._record(request, "CANCELLED", 0.0)

    def _record(self, request: _Request, status: str, rows: float) -> None:
        self._requests.discard(request)
        finished_s = clock() - self._zero_s
        due_s, class_index = request.due_s, request.class_index
        self.samples.add(
            due_s,
            request.sent_s,
            finished_s,
            status,
            self._images[class_index],
            class_index,
            request.tries,
            request.wait_s,
            rows,
        )
        progress = self._progress
        if status == OK:
            progress.answered += 1
            if len(progress.latencies_s) < MAX_RECENT_LATENCIES:
                progress.latencies_s.append(finished_s - due_s)
        elif status in REFUSED:
            progress.refused += 1
        else:
            progress.failed += 1


class _Request(UnaryCall):
    """A request of a run, sent once or several times."""

    __slots__ = (
        "body",
        "channel",
        "class_index",
        "due_s",
        "retry_timer",
        "run",
        "sent_s",
        "tries",
        "wait_s",
    )

    def __init__(
        self,
        run: Run,
        channel: CallSender,
        body: bytes,
        due_s: float,
        sent_s: float,
        class_index: int,
    ) -> None:
        self.run = run
        self.channel = channel
        self.body = body
        self.due_s = due_s
        self.sent_s = sent_s
        self.class_index = class_index
        self.tries = 1
        self.wait_s = -1.0  # that the last refusal asked for
        self.retry_timer: asyncio.TimerHandle | None = None

    def ended(self) -> None:
        self.run.call_ended(self)


def _ignore(code: int) -> None:
    pass
