"""Threads that principals share: each gets processor time by its weight."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from server.security.principal import ANONYMOUS, Principal

COST_WEIGHT = 0.2  # of a new measurement in a principal's average cost


class FairThreads:
    """Runs work in threads. The principal that has used the least processor time goes first.

    Without it, work would wait behind all work that another principal has submitted before. May be
    used by any thread.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}  # of principals whose work waits or runs
        self._virtual_s = 0.0  # of the principal that ran last

    def submit(
        self, principal: Principal, function: Callable[..., Any], *arguments: Any
    ) -> Future[Any]:
        """Runs the function in a thread. The future can be cancelled until it starts."""
        if principal.name == ANONYMOUS:
            return self._threads.submit(function, *arguments)
        future: Future[Any] = Future()
        with self._lock:
            line = self._lines.get(principal.name)
            if line is None:
                line = self._lines[principal.name] = _Line(principal.weight, self._virtual_s)
            line.add((future, function, arguments))
        self._threads.submit(self._run_next)  # not necessarily this work
        return future

    def _run_next(self) -> None:
        while (taken := self._take()) is not None:
            line, expected_s, (future, function, arguments) = taken
            began_s = time.thread_time()
            try:
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    result = function(*arguments)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                return
            finally:
                with self._lock:
                    line.end(expected_s, time.thread_time() - began_s)
                    self._lines = {name: one for name, one in self._lines.items() if one.is_used}

    def _take(self) -> tuple[_Line, float, Work] | None:
        """The next work; None if all is running or done."""
        with self._lock:
            waiting = [line for line in self._lines.values() if line.waiting]
            if not waiting:
                return None
            line = min(waiting, key=lambda line: line.virtual_s)
            self._virtual_s = max(self._virtual_s, line.virtual_s)
            return line, *line.take()


Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class _Line:
    """The work of one principal, and the processor time it has used."""

    __slots__ = ("_cost_s", "_running", "_weight", "virtual_s", "waiting")

    def __init__(self, weight: float, virtual_s: float) -> None:
        self.waiting: deque[Work] = deque()
        self.virtual_s = virtual_s  # processor seconds divided by the weight
        self._weight = weight
        self._cost_s = 0.001  # expected
        self._running = 0

    @property
    def is_used(self) -> bool:
        return bool(self.waiting or self._running)

    def add(self, work: Work) -> None:
        self.waiting.append(work)

    def take(self) -> tuple[float, Work]:
        """The next work, which is charged with the returned seconds until it ends."""
        self._running += 1
        self.virtual_s += self._cost_s / self._weight
        return self._cost_s, self.waiting.popleft()

    def end(self, expected_s: float, seconds: float) -> None:
        self._running -= 1
        self.virtual_s += (seconds - expected_s) / self._weight
        self._cost_s += COST_WEIGHT * (seconds - self._cost_s)
