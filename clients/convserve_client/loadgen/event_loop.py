"""Event loop of the load generator, its clock, and a timer that is more precise than the loop's."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

clock = time.monotonic  # the same for all processes of a machine


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` in uvloop, which costs less CPU time, or in asyncio's loop without it."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


class PreciseTimer:
    """Calls back at given times, to about 50 us. An event loop's own timers tick in milliseconds.

    Belongs to one event loop. `close` it when it is no longer needed.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._armed = False
        self._handle: asyncio.TimerHandle | None = None
        if sys.platform == "linux":  # other systems use the loop's timers
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            self._loop.add_reader(self._fd, self._expired)
        # struct itimerspec: interval and time, each in seconds and nanoseconds
        self._spec = (ctypes.c_long * 4)()

    def set(self, when_s: float) -> None:
        """Calls back at `when_s` on `clock`, or at once if that time has passed."""
        if self._fd < 0:
            self._handle = self._loop.call_later(max(0.0, when_s - clock()), self._callback)
            return
        self._armed = True
        seconds = int(when_s)
        self._spec[2] = seconds
        self._spec[3] = max(1, int((when_s - seconds) * 1e9))  # zeros would disarm the timer
        absolute = 1
        self._libc.timerfd_settime(self._fd, absolute, self._spec, None)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _expired(self) -> None:
        self._armed = False
        self._callback()
        if not self._armed:  # setting the timer again also clears its event
            os.read(self._fd, 8)
