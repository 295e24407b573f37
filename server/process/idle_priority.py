"""Runs work at idle priority, so that loading a model does not slow down requests.

On Linux a new thread inherits the scheduling policy of its creator. So the thread that loads an
engine gets SCHED_IDLE; at the end it and all threads that it created get the normal policy back,
because the engine's threads must serve requests. If the system would not allow this, the policy is
never changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

# On a machine that is never idle, idle threads would wait forever. So they are reset after a time.
# The loading thread is reset earlier than the threads it creates: while it waits for a processor it
# may hold the GIL and block all other threads (on two cores that other processes kept busy,
# requests waited 0.8 s for it).
OWN_LIMIT_S = 1.0
LIMIT_S = 30.0


@contextmanager
def idle_priority(own_limit_s: float = OWN_LIMIT_S) -> Iterator[None]:
    """Gives this thread and the threads it creates idle priority, until the end or a time limit."""
    if not is_reversible():
        yield
        return
    own, existing = threading.get_native_id(), _thread_ids()

    def reset() -> None:
        for thread in {own, *(_thread_ids() - existing)}:
            _switch(thread, os.SCHED_IDLE, os.SCHED_OTHER)

    timers = [
        threading.Timer(own_limit_s, _switch, (own, os.SCHED_IDLE, os.SCHED_OTHER)),
        threading.Timer(LIMIT_S, reset),
    ]
    for timer in timers:  # started first, so that they have normal priority
        timer.start()
    _switch(own, os.SCHED_OTHER, os.SCHED_IDLE)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        reset()


@cache
def is_reversible() -> bool:
    """Whether the system lets a thread leave idle priority again, which needs a permission."""
    policies = []

    def attempt() -> None:
        own = threading.get_native_id()
        _switch(own, os.SCHED_OTHER, os.SCHED_IDLE)
        _switch(own, os.SCHED_IDLE, os.SCHED_OTHER)
        policies.append(os.sched_getscheduler(own))

    trial = threading.Thread(target=attempt)
    trial.start()
    trial.join()
    return policies == [os.SCHED_OTHER]


def _switch(thread: int, old: int, new: int) -> None:
    """Changes a thread's scheduling policy, if it is the old one."""
    with suppress(OSError):  # the thread has ended, or the change is not allowed
        if os.sched_getscheduler(thread) == old:
            os.sched_setscheduler(thread, new, os.sched_param(0))


def _thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
