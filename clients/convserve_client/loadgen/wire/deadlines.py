"""Deadlines of calls: one timer and a heap for all calls of a channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from convserve_client.loadgen.event_loop import clock
from convserve_client.loadgen.wire.call import UnaryCall

TIMER_TICK_S = 0.001  # the loop's timers may be early by that much
MAX_DONE_DEADLINES = 1000  # entries of finished calls in the heap, beside the active ones


class Deadlines:
    """Calls `on_expired` with each call that is not done at its deadline. Never early."""

    def __init__(self, on_expired: Callable[[UnaryCall], None]) -> None:
        self._on_expired = on_expired
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, UnaryCall]] = []
        self._added = 0
        self._purge_at = MAX_DONE_DEADLINES  # number of added calls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0

    def add(self, call: UnaryCall) -> None:
        """Adds a call that has begun."""
        deadline_s = call.deadline_s
        self._added = number = self._added + 1
        heappush(self._heap, (deadline_s, number, call))
        if self._timer is None or deadline_s < self._timer_at_s:
            self._set_timer(deadline_s)
        if number > self._purge_at:
            self._purge()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, deadline_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_s = deadline_s
        delay_s = max(0.0, deadline_s - clock()) + TIMER_TICK_S
        self._timer = self._loop.call_later(delay_s, self._expire)

    def _expire(self) -> None:
        """Ends the calls whose deadline has passed, and sets the timer for the next deadline."""
        self._timer = None
        heap, now_s = self._heap, clock()
        while heap and (heap[0][0] <= now_s or _is_stale(heap[0])):
            deadline = heappop(heap)
            if not _is_stale(deadline):
                self._on_expired(deadline[2])
        if heap and (self._timer is None or heap[0][0] < self._timer_at_s):
            self._set_timer(heap[0][0])

    def _purge(self) -> None:
        """Drops the entries of finished calls."""
        self._heap[:] = [
            one for one in self._heap if not one[2].is_done and one[2].deadline_s == one[0]
        ]
        heapify(self._heap)
        self._purge_at = self._added + len(self._heap) + MAX_DONE_DEADLINES


def _is_stale(deadline: tuple[float, int, UnaryCall]) -> bool:
    """Whether the entry belongs to a call that is done or was sent again since."""
    deadline_s, _, call = deadline
    return call.is_done or call.deadline_s != deadline_s
