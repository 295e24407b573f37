"""The thread that loads models. The process exits without waiting for a load in progress.

Waiting would delay shutdown for as long as a large network takes to load, and forever if a library
hangs. Python waits for threads at exit, so `is_still_loading` tells the caller to use `os._exit`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

log = logging.getLogger(__name__)

THREAD_NAME = "load"
SHUTDOWN_S = 2.0  # for a load in progress to notice that the server stops
JOIN_S = 0.5  # for an idle thread to end


@contextmanager
def load_thread() -> Iterator[ThreadPoolExecutor]:
    """An executor with one thread. At the end it drops its queue and does not wait."""
    executor = ThreadPoolExecutor(1, THREAD_NAME)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


async def wait_until_idle(executor: ThreadPoolExecutor) -> None:
    """Waits until the load in progress has ended, at most SHUTDOWN_S."""
    try:
        async with asyncio.timeout(SHUTDOWN_S):
            await asyncio.wrap_future(executor.submit(int))  # runs after the load in progress
    except TimeoutError:
        log.warning("load_still_running_at_exit", extra={"seconds": SHUTDOWN_S})


def is_still_loading() -> bool:
    """Whether a load thread does not end within JOIN_S."""
    threads = [one for one in threading.enumerate() if one.name.startswith(THREAD_NAME)]
    for thread in threads:
        thread.join(JOIN_S)
    return any(thread.is_alive() for thread in threads)
