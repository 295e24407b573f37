"""Keeps heavy work on the event loop apart, so that other calls run between its pieces."""

from __future__ import annotations

import asyncio
from collections import deque

TURN_S = 0.002


class WorkTurns:
    """Lets heavy work of TURN_S begin in each turn of the loop, and at least one piece of it.

    A piece takes up to 75 ms for the largest message. All requests that arrive in one turn of the
    loop would start in the next one, and together hold it for seconds. Used on the event loop's
    thread only.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self._is_scheduled = False

    async def wait(self, cost_s: float) -> None:
        """Returns at the beginning of a turn with time for work that takes about `cost_s`."""
        turn = self._loop.create_future()
        self._waiting.append((turn, cost_s))
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._begin)
        await turn

    def _begin(self) -> None:
        left_s = TURN_S
        while self._waiting and left_s > 0:
            turn, cost_s = self._waiting.popleft()
            if not turn.done():  # else its caller has left
                turn.set_result(None)
                left_s -= cost_s
        self._is_scheduled = bool(self._waiting)
        if self._is_scheduled:
            self._loop.call_soon(self._begin)
