"""A timer that fires once, at the earliest of the times it was set to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class WakeTimer:
    """Calls `callback` at the earliest time given to `set`. Used on the event loop's thread."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._due_s = math.inf

    def set(self, due_s: float, now_s: float) -> None:
        if self._handle is not None:
            if due_s >= self._due_s:
                return
            self._handle.cancel()
        self._due_s = due_s
        self._handle = self._loop.call_later(max(0.0, due_s - now_s), self._fire)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        self._handle = None
        self._callback()
