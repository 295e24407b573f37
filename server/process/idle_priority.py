"""Gives way: what is loaded meanwhile must not hold up the calls that are answered meanwhile.

Linux gives a new thread the scheduling of its maker. So a thread that loads an engine is made to
run where no other wants to (SCHED_IDLE), and at the end it and all that it made are set back: the
engine's own threads are to serve. Where the system does not let us set them back, nothing is
changed in the first place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

# On a machine that is never idle what gives way would wait for ever. The thread that loads is set
# back sooner than those it makes: while it waits for a processor it may hold Python's lock, and so
# hold up all others (on two cores that other processes kept busy, calls waited 0.8 s for it).
OWN_PATIENCE_S = 1.0
PATIENCE_S = 30.0


@contextmanager
def idle_priority(own_patience_s: float = OWN_PATIENCE_S) -> Iterator[None]:
    """This thread and those it makes come last, until the end or until their patience is."""
    if not reversible():
        yield
        return
    own, before = threading.get_native_id(), _threads()

    def set_back() -> None:
        for thread in {own, *(_threads() - before)}:
            _move(thread, os.SCHED_IDLE, os.SCHED_OTHER)

    timers = [
        threading.Timer(own_patience_s, _move, (own, os.SCHED_IDLE, os.SCHED_OTHER)),
        threading.Timer(PATIENCE_S, set_back),
    ]
    for timer in timers:  # made before, and so as usual
        timer.start()
    _move(own, os.SCHED_OTHER, os.SCHED_IDLE)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        set_back()


@cache
def reversible() -> bool:
    """Whether a thread that gave way can be set back: a right of its own."""
    left = []

    def attempt() -> None:
        own = threading.get_native_id()
        _move(own, os.SCHED_OTHER, os.SCHED_IDLE)
        _move(own, os.SCHED_IDLE, os.SCHED_OTHER)
        left.append(os.sched_getscheduler(own))

    trial = threading.Thread(target=attempt)
    trial.start()
    trial.join()
    return left == [os.SCHED_OTHER]


def _move(thread: int, old: int, new: int) -> None:
    """Changes a thread's policy from the old one."""
    with suppress(OSError):  # it has ended, or it is not allowed
        if os.sched_getscheduler(thread) == old:
            os.sched_setscheduler(thread, new, os.sched_param(0))


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
