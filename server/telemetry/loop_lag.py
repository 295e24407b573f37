"""How far the event loop is behind: what waits for it, at the pace of what it got to last."""

from __future__ import annotations

import time

clock = time.monotonic


class LoopLag:
    """Counts what waits for the loop, calls to begin and answers to be sent, and learns how long
    each takes. One for all calls of a server; used on the loop's thread only.

    The pace is the time in which something waited, over what the loop got to meanwhile: so
    everything counts that it does then, and nothing that others do while it is idle. Where nothing
    waits the next call waits for nothing, however slow the loop once was: somebody always begins,
    and the pace is learned anew.
    """

    WINDOW = 32  # things got to between two looks at the pace
    WEIGHT = 0.25  # of such a look

    def __init__(self) -> None:
        self._waiting = 0
        self._since_s = 0.0  # when it last became more than none
        self._busy_s = 0.0  # in this window, up to then
        self._count = 0  # in this window
        self._each_s = 0.0

    @property
    def wait_s(self) -> float:
        """How long something would wait that came now, in seconds."""
        return self._waiting * self._each_s

    def waits(self) -> None:
        """Something is to be done."""
        if not self._waiting:
            self._since_s = clock()
        self._waiting += 1

    def leaves(self) -> None:
        """It is to be done no more."""
        self._waiting -= 1
        if not self._waiting:
            self._busy_s += clock() - self._since_s

    def begins(self) -> None:
        """The loop has got to it."""
        self._waiting -= 1
        self._count += 1
        if self._count == self.WINDOW:
            self._look()
        elif not self._waiting:
            self._busy_s += clock() - self._since_s

    def _look(self) -> None:
        now_s = clock()
        busy_s = self._busy_s + now_s - self._since_s
        self._each_s += self.WEIGHT * (busy_s / self.WINDOW - self._each_s)
        self._since_s = now_s
        self._busy_s = 0.0
        self._count = 0
