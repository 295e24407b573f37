"""How long new work waits for the event loop."""

from __future__ import annotations

from server.telemetry.clock import clock


class LoopLag:
    """Predicts how long a new task waits for the event loop.

    The prediction is the number of waiting tasks multiplied by the recent time per task.

    Tasks are calls to start and answers to send. One object serves all calls of a server. Use it on
    the event loop's thread only.

    The time per task is the time during which at least one task waited, divided by the number of
    tasks that the loop started meanwhile. So it includes everything that the loop does then, and
    excludes idle time. If no task waits, the predicted wait is 0, even if the loop was slow before:
    some tasks always start, and their measured time replaces the old one.
    """

    WINDOW = 32  # tasks per measurement
    WEIGHT = 0.25  # of a new measurement in the moving average

    def __init__(self) -> None:
        self._waiting = 0
        self._busy_since_s = 0.0  # when `_waiting` became more than 0
        self._busy_s = 0.0  # in this window, before `_busy_since_s`
        self._started = 0  # in this window
        self._task_s = 0.0

    @property
    def task_s(self) -> float:
        """Recent seconds per task."""
        return self._task_s

    @property
    def wait_s(self) -> float:
        """Seconds that a new task would wait."""
        return self._waiting * self._task_s

    def task_queued(self) -> None:
        if not self._waiting:
            self._busy_since_s = clock()
        self._waiting += 1

    def task_cancelled(self) -> None:
        """A task that waits will not start."""
        self._waiting -= 1
        if not self._waiting:
            self._busy_s += clock() - self._busy_since_s

    def task_started(self) -> None:
        self._waiting -= 1
        self._started += 1
        if self._started == self.WINDOW:
            self._measure()
        elif not self._waiting:
            self._busy_s += clock() - self._busy_since_s

    def _measure(self) -> None:
        now_s = clock()
        busy_s = self._busy_s + now_s - self._busy_since_s
        self._task_s += self.WEIGHT * (busy_s / self.WINDOW - self._task_s)
        self._busy_since_s = now_s
        self._busy_s = 0.0
        self._started = 0
