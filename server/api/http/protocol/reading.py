"""When an HTTP connection reads from its socket, and how long in a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

TURN_S = 0.002  # that one connection may read in a turn of the loop
ALL_TURNS_S = 0.004  # that all connections together may read in one turn


class ReadingTurns:
    """Decides which connections read in a turn of the loop. Used on the event loop's thread only.

    Connections read as their bytes come, until they have used ALL_TURNS_S of this turn. The others
    wait in a queue, of which one connection reads in each turn.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], None]] = deque()
        self._spent_s = 0.0  # in this turn

    def may_read(self) -> bool:
        """Whether there is time left in this turn."""
        return self._spent_s < ALL_TURNS_S

    def spend(self, seconds: float) -> None:
        """Counts time that a connection has read in this turn."""
        if not self._spent_s:
            self._loop.call_soon(self._next_turn)
        self._spent_s += seconds

    def wait(self, continue_reading: Callable[[], None]) -> None:
        """Calls `continue_reading` in a later turn."""
        if not self._waiting:
            self._loop.call_soon(self._run_one)
        self._waiting.append(continue_reading)

    def _next_turn(self) -> None:
        self._spent_s = 0.0

    def _run_one(self) -> None:
        continue_reading = self._waiting.popleft()
        if self._waiting:
            self._loop.call_soon(self._run_one)
        continue_reading()


class ReadFlow(FlowControl):
    """Uvicorn's flow control, in which bytes that wait for their turn stop reading too.

    Uvicorn pauses reading while a request is answered and while a body waits for its reader.
    """

    def __init__(self, transport: asyncio.Transport, on_resumed: Callable[[], None]) -> None:
        """`on_resumed` is called when uvicorn takes bytes again."""
        super().__init__(transport)
        self._on_resumed = on_resumed
        self._is_holding = False  # bytes wait for their turn
        self._is_reading = True

    def hold(self) -> None:
        """Stops reading until `let_go`."""
        self._is_holding = True
        self._apply(force=True)

    def let_go(self) -> None:
        self._is_holding = False
        self._apply()

    def pause_reading(self) -> None:
        self.read_paused = True
        self._apply()

    def resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self._on_resumed()
            self._apply()

    def _apply(self, *, force: bool = False) -> None:
        """Pauses or resumes the transport. `force` also if it was done: uvicorn may resume it."""
        is_reading = not (self.read_paused or self._is_holding)
        if (is_reading == self._is_reading and not force) or self._transport.is_closing():
            return
        self._is_reading = is_reading
        if is_reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
