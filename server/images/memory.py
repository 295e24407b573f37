"""Bounds the memory that all decoders use at once."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class MemoryNeeded(Exception):
    """The budget has too little memory free at the moment: wait for `needed` bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed:,} bytes are needed")
        self.needed = needed


class Waiter:
    """Waits for memory. `granted` is called once, in any thread, when the memory is reserved."""

    __slots__ = ("granted", "needed")

    def __init__(self, needed: int, granted: Callable[[], object]) -> None:
        self.needed = needed
        self.granted = granted


class MemoryBudget:
    """Bytes that decoders may use at once. Any thread may call it.

    Waiters get memory in their order. While one waits, none overtakes it: otherwise small images
    could keep a large one waiting for ever.
    """

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self.limit_bytes = limit_bytes
        self._used = 0
        self._waiters: deque[Waiter] = deque()
        self._lock = Lock()

    @property
    def used_bytes(self) -> int:
        return self._used

    @property
    def waiting(self) -> int:
        """How many wait for memory."""
        return len(self._waiters)

    @contextmanager
    def hold(self, needed: int) -> Iterator[None]:
        """Reserves memory for the body. Raises MemoryNeeded if too little is free."""
        with self._lock:
            if self._waiters or self._used + needed > self.limit_bytes:
                raise MemoryNeeded(needed)
            self._used += needed
        try:
            yield
        finally:
            self.release(needed)

    def wait(self, needed: int, granted: Callable[[], object]) -> Waiter:
        """Queues for memory. The caller must end with `release`, or with `leave` before that."""
        waiter = Waiter(needed, granted)
        with self._lock:
            self._waiters.append(waiter)
        self.release(0)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Ends waiting; releases the memory if it was granted in the meantime."""
        with self._lock:
            is_waiting = waiter in self._waiters
            if is_waiting:
                self._waiters.remove(waiter)
        self.release(0 if is_waiting else waiter.needed)

    def release(self, needed: int) -> None:
        """Gives memory back, and grants it to those who wait."""
        served: list[Waiter] = []
        with self._lock:
            self._used -= needed
            while self._waiters and self._used + self._waiters[0].needed <= self.limit_bytes:
                waiter = self._waiters.popleft()
                self._used += waiter.needed
                served.append(waiter)
        for waiter in served:
            waiter.granted()


UNLIMITED = MemoryBudget()
