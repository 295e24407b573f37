"""Reads the bytes of HTTP/2 connections, so that no client holds the event loop.

A connection reads for at most TURN_BUDGET_S, then pauses and continues in a later turn of the loop.
What its frames start, such as calls, takes time too, so the reader counts an estimate of it. With
many connections that wait, each reads for a shorter time, so that all have their turn soon.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ngh2 import Connection
from ngh2.exceptions import ConnectionStateError

from server.telemetry.clock import clock
from server.transport.http2.frame_audit import FrameAudit, FrameError

TURN_BUDGET_S = 0.002  # of one connection
ALL_TURN_BUDGET_S = 0.004  # of all connections in one turn; then all others wait
ROUND_S = 0.05  # in which all connections that wait have their turn, if they are not too many
MIN_BUDGET_S = 0.0002  # of one connection, however many wait
EVENTS_PER_CHECK = 32  # of the time

# What frames cost after they are read: most start a call, whose message is parsed. A small call
# takes 30 to 50 us, a picture of 150 KB about 0.2 ms.
EVENT_COST_S = 10e-6
BYTE_COST_S = 8e-9

# The library reads a slice of input at once, and a frame that ends in another slice costs a copy. A
# slice grows while the client's bytes are cheap to read. An expensive one makes the next one small.
MIN_SLICE_BYTES = 1 << 10
FIRST_SLICE_BYTES = 32 << 10
MAX_SLICE_BYTES = 256 << 10
CHEAP_READ_S = TURN_BUDGET_S / 8  # cheaper ones are not counted


class ReadingTurns:
    """Shares the turns of the event loop between the connections of one server.

    Connections with bytes that wait to be read stand in two queues. In one are those whose bytes
    have just come, when the turn was used up already. In the other are those that have used up
    their own budget; at least one of them reads in each turn. So many busy connections do not hold
    the loop for longer than one, and a client that sends little waits for few others.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._new: deque[Callable[[], None]] = deque()
        self._busy: deque[Callable[[], None]] = deque()
        self._spent_s = 0.0  # in this turn, by reads that were not cheap
        self._is_scheduled = False

    @property
    def is_over(self) -> bool:
        """Whether connections that have not read in this turn must wait for a later one."""
        return self._spent_s > ALL_TURN_BUDGET_S

    @property
    def budget_s(self) -> float:
        """How long one connection may read."""
        waiting = len(self._new) + len(self._busy)
        if waiting * TURN_BUDGET_S <= ROUND_S:
            return TURN_BUDGET_S
        return max(MIN_BUDGET_S, ROUND_S / waiting)

    def spend(self, seconds: float) -> None:
        """Counts what a connection has used of this turn."""
        if not self._spent_s:
            self._loop.call_soon(self._end_turn)
        self._spent_s += seconds

    def add(self, continue_reading: Callable[[], None], *, is_new: bool = False) -> None:
        """Calls `continue_reading` in a later turn."""
        (self._new if is_new else self._busy).append(continue_reading)
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _end_turn(self) -> None:
        self._spent_s = 0.0

    def _run(self) -> None:
        self._is_scheduled = False
        until_s = clock() + TURN_BUDGET_S
        for queue in (self._new, self._busy):
            for _ in range(len(queue)):  # those that come again wait for the next turn
                queue.popleft()()
                if clock() > until_s or self.is_over:
                    break
        if (self._new or self._busy) and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)


class InputReader:
    """Reads the bytes of one connection. Keeps what has to wait for a later turn.

    `handle` gets at most EVENTS_PER_CHECK events at a time.
    """

    def __init__(
        self, http2: Connection, turns: ReadingTurns, handle: Callable[[list[Any]], None]
    ) -> None:
        self._http2 = http2
        self._turns = turns
        self._handle = handle
        self._unread = b""
        self._events: list[Any] = []  # that came from bytes that were read
        self._slice_bytes = FIRST_SLICE_BYTES
        self._audit: FrameAudit | None = FrameAudit()  # until it is over
        self._error: FrameError | None = None
        self._is_stopped = False
        self.is_paused = False  # a later turn continues
        self.is_new = False  # it has not read in the turn in which its bytes came

    def keep(self, data: bytes) -> None:
        """Keeps bytes for the later turn."""
        self._unread += data
        self._check(data)

    def stop(self) -> None:
        """Drops what waits and reads nothing more: the connection is closed."""
        self._is_stopped = True
        self._unread = b""
        self._events = []

    def read(self, data: bytes) -> None:
        """Reads `data`, until the turn's budget is used up.

        Raises NGH2Error or FrameError if the client broke the protocol so badly that no session is
        left.
        """
        if self._audit is not None:
            self._check(data)
        if self._turns.is_over:
            self._unread = data
            self.is_paused = self.is_new = True
        else:
            self._read(data)

    def read_on(self) -> None:
        """Reads what waits, in a later turn. Raises as `read` does."""
        unread, self._unread = self._unread, b""
        self.is_new = False
        self._read(unread)

    def _check(self, data: bytes) -> None:
        """Looks for errors that the library overlooks. `_read` raises what it finds."""
        if self._audit is None:
            return
        try:
            self._audit.check(data)
        except FrameError as error:
            self._error = error
        if self._audit.is_over:
            self._audit = None

    def _read(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        start, size = 0, len(data)
        begins_s = now_s = clock()
        budget_s = self._turns.budget_s
        largest = int(
            MAX_SLICE_BYTES * (budget_s / TURN_BUDGET_S) ** 2
        )  # short turns, short slices
        cost_s = 0.0  # of what is read in this turn
        is_done = not self._events or self._handle_rest(now_s + budget_s)
        while is_done and start < size and not self._is_stopped:
            length = min(self._slice_bytes, largest, size - start)
            try:
                if length < size:
                    self._http2.receive_data(memoryview(data)[start : start + length])
                else:
                    self._http2.receive_data(data)
            except ConnectionStateError:  # it is closing: the library ignores the client
                break
            start += length
            self._events = events = self._http2.events()
            cost_s += length * BYTE_COST_S + len(events) * EVENT_COST_S
            is_done = self._handle_rest(begins_s + budget_s)
            began_s, now_s = now_s, clock()
            self._choose_slice(length, now_s - began_s, budget_s)
            is_done = is_done and (
                start >= size or (now_s - begins_s < budget_s and cost_s < budget_s)
            )
        if not is_done:
            self._unread = data[start:]
        self.is_paused = not is_done
        cost_s = max(cost_s, now_s - begins_s)
        if cost_s > CHEAP_READ_S:
            self._turns.spend(cost_s)

    def _handle_rest(self, until_s: float) -> bool:
        """Handles `_events`. Returns False if the time is over; then `_events` is the rest."""
        events, self._events = self._events, []
        if len(events) <= EVENTS_PER_CHECK:
            self._handle(events)
            return True
        for first in range(0, len(events), EVENTS_PER_CHECK):
            if first and clock() > until_s:
                self._events = events[first:]
                return False
            self._handle(events[first : first + EVENTS_PER_CHECK])
        return True

    def _choose_slice(self, length: int, took_s: float, budget_s: float) -> None:
        if took_s > budget_s / 2:
            self._slice_bytes = max(MIN_SLICE_BYTES, self._slice_bytes // 4)
        elif length == self._slice_bytes and took_s < budget_s / 8:
            self._slice_bytes = min(2 * length, MAX_SLICE_BYTES)
