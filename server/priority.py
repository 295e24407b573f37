"""Gives way: what is loaded meanwhile must not hold up the calls that are answered meanwhile.

Linux gives every thread a niceness, and a new thread that of its maker's. So a thread that loads an
engine is made nice, and at the end it and all that it made are set back: the engine's own threads
are to serve. Where the system does not let us set it back, nothing is changed in the first place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

NICE = 19


@contextmanager
def giving_way() -> Iterator[None]:
    """This thread and those it makes come last until the end."""
    if not reversible():
        yield
        return
    before, usual = _threads(), os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    try:
        yield
    finally:
        for thread in {threading.get_native_id(), *(_threads() - before)}:
            with suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, usual)


@cache
def reversible() -> bool:
    """Whether a thread that was made nice can be set back: a right of its own."""
    allowed = False

    def attempt() -> None:
        nonlocal allowed
        own, usual = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0)
        try:
            os.setpriority(os.PRIO_PROCESS, own, min(NICE, usual + 1))
            os.setpriority(os.PRIO_PROCESS, own, usual)
            allowed = True
        except OSError:
            pass

    trial = threading.Thread(target=attempt)
    trial.start()
    trial.join()
    return allowed


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
