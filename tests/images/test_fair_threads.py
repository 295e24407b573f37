"""Threads that principals share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest

from server.images.fair_threads import FairThreads
from server.security.principal import LOCAL_CALLER, Principal


def principal(name: str, weight: float = 1.0) -> Principal:
    return Principal(name=name, roles=frozenset(), weight=weight)


FLOOD, MODEST = principal("flood"), principal("modest")


@contextmanager
def one_held_thread() -> Iterator[tuple[FairThreads, threading.Event]]:
    """One thread, which is busy until the event is set."""
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.wait)
        try:
            yield FairThreads(pool), gate
        finally:
            gate.set()


def spin(order: list[str], name: str, seconds: float) -> None:
    """Uses the processor for `seconds`."""
    order.append(name)
    ends_s = time.thread_time() + seconds
    while time.thread_time() < ends_s:
        pass


def test_work_does_not_wait_behind_the_work_of_another_principal() -> None:
    order: list[str] = []
    with one_held_thread() as (threads, gate):
        futures = [threads.submit(FLOOD, order.append, "flood") for _ in range(50)]
        futures.append(threads.submit(MODEST, order.append, "modest"))
        gate.set()
        wait(futures)
    assert len(order) == 51
    assert order.index("modest") <= 1


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_principals_get_thread_time_by_weight(weight: float) -> None:
    order: list[str] = []
    with one_held_thread() as (threads, gate):
        heavy = principal("heavy", weight)
        futures = [threads.submit(heavy, spin, order, "heavy", 0.001) for _ in range(120)]
        futures += [threads.submit(MODEST, spin, order, "modest", 0.001) for _ in range(120)]
        gate.set()
        wait(futures)
    first = order[:120]
    assert first.count("heavy") / first.count("modest") == pytest.approx(weight, rel=0.5)


def test_expensive_work_of_one_principal_costs_it_turns() -> None:
    order: list[str] = []
    with one_held_thread() as (threads, gate):
        futures: list[Future[Any]] = []
        for _ in range(20):
            futures.append(threads.submit(FLOOD, spin, order, "flood", 0.01))
            futures.append(threads.submit(MODEST, spin, order, "modest", 0.0))
        gate.set()
        wait(futures)
    assert order[:30].count("modest") == 20, "cheap work is done first, after a few turns"


def test_results_errors_and_cancelled_work_reach_their_futures() -> None:
    done: list[int] = []
    with one_held_thread() as (threads, gate):
        good = threads.submit(FLOOD, int, "7")
        bad = threads.submit(FLOOD, int, "x")
        cancelled = threads.submit(FLOOD, done.append, 1)
        last = threads.submit(MODEST, int, "8")
        anonymous = threads.submit(LOCAL_CALLER, int, "9")
        assert cancelled.cancel()
        gate.set()
        assert [good.result(), last.result(), anonymous.result()] == [7, 8, 9]
        assert isinstance(bad.exception(), ValueError)
    assert not done
