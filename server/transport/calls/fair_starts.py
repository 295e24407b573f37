"""Starts the calls of principals in turn, so that none waits behind the calls of another."""

from __future__ import annotations

import asyncio
from collections import deque

from server.security.principal import ANONYMOUS, Principal
from server.telemetry.loop_lag import LoopLag

TURN_S = 0.001  # work to start in one turn of the event loop
MIN_STARTS, MAX_STARTS = 4, 64  # in one turn

BYTES_PER_START = 64 << 10  # a request with this many bytes costs twice as much as a small one


class FairStarts:
    """Decides when calls start. Used on the event loop's thread only.

    In one turn of the event loop only some calls start. The others wait in a line for each
    principal, and the principal that has started the least for its weight goes first. So a call
    waits for the calls of its own principal, and for one turn. Calls of anonymous callers start at
    once.
    """

    def __init__(self, loop_lag: LoopLag) -> None:
        self._loop_lag = loop_lag
        self._loop = asyncio.get_running_loop()
        self._lines: dict[str, _Line] = {}  # of principals with waiting calls
        self._virtual = 0.0  # of the line that went last
        self._started = 0  # in this turn
        self._has_turn = False  # `_next_turn` is scheduled

    def wait_of(self, principal: Principal) -> tuple[float, bool]:
        """Seconds that another call would wait before it starts, and whether its principal has
        fewer waiting calls than its share."""
        all_s = self._loop_lag.wait_s
        line = self._lines.get(principal.name)
        own = len(line.waiting) if line is not None else 0
        others = [one for name, one in self._lines.items() if name != principal.name]
        share = principal.weight / (principal.weight + sum(one.weight for one in others))
        wait_s = min(all_s, (own + 1) * self._loop_lag.task_s / share)
        return wait_s, own < share * sum(len(one.waiting) for one in others)

    async def turn(self, principal: Principal, size: int = 0) -> None:
        """Waits until a call whose request has `size` bytes may start."""
        if principal.name == ANONYMOUS:
            return
        if not self._has_turn:
            self._has_turn = True
            self._loop.call_soon(self._next_turn)
        if not self._lines and self._started < self._most():
            self._started += 1
            return
        line = self._lines.get(principal.name)
        if line is None:
            line = self._lines[principal.name] = _Line(principal.weight, self._virtual)
        future = self._loop.create_future()
        line.waiting.append((future, 1.0 + size / BYTES_PER_START))
        await future

    def _next_turn(self) -> None:
        self._started = 0
        most = self._most()
        while self._lines and self._started < most:
            name, line = min(self._lines.items(), key=lambda item: item[1].virtual)
            self._virtual = max(self._virtual, line.virtual)
            future, cost = line.waiting.popleft()
            if not line.waiting:
                del self._lines[name]
            if not future.done():  # else its call has ended
                line.virtual += cost / line.weight
                self._started += 1
                future.set_result(None)
        self._has_turn = self._started > 0
        if self._has_turn:
            self._loop.call_soon(self._next_turn)

    def _most(self) -> int:
        """How many calls may start in one turn."""
        task_s = self._loop_lag.task_s
        return MAX_STARTS if not task_s else int(min(max(TURN_S / task_s, MIN_STARTS), MAX_STARTS))


class _Line:
    """The waiting calls of one principal, with their costs."""

    __slots__ = ("virtual", "waiting", "weight")

    def __init__(self, weight: float, virtual: float) -> None:
        self.waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self.weight = weight
        self.virtual = virtual  # cost of the calls that have started, divided by the weight
