"""How far behind the loop is, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from server.telemetry import loop_lag
from server.telemetry.loop_lag import LoopLag


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop_lag, "clock", clock)
    return clock


def work(one: LoopLag, clock: Clock, things: int, each_s: float) -> None:
    """So many wait, and the loop gets to one after the other."""
    for _ in range(things):
        one.task_queued()
    for _ in range(things):
        clock.now_s += each_s
        one.task_started()


def test_what_comes_waits_for_all_that_waits_at_the_pace_of_late(clock: Clock) -> None:
    one = LoopLag()
    for _ in range(20):
        work(one, clock, LoopLag.WINDOW, 0.001)
    assert one.wait_s == 0
    for _ in range(5):
        one.task_queued()
    assert one.wait_s == pytest.approx(0.005, rel=0.05)
    one.task_cancelled()
    assert one.wait_s == pytest.approx(0.004, rel=0.05)


def test_idle_time_says_nothing_of_the_pace(clock: Clock) -> None:
    one = LoopLag()
    for _ in range(1000):
        work(one, clock, 2, 0.001)
        clock.now_s += 1.0
    one.task_queued()
    assert one.wait_s == pytest.approx(0.001, rel=0.05)


def test_one_that_leaves_was_waited_for_by_the_others_and_is_none_that_the_loop_got_to(
    clock: Clock,
) -> None:
    one = LoopLag()
    for _ in range(1000):
        one.task_queued()
        one.task_queued()
        clock.now_s += 0.001
        one.task_cancelled()
        clock.now_s += 0.001
        one.task_started()
    one.task_queued()
    assert one.wait_s == pytest.approx(0.002, rel=0.05)


def test_a_pace_that_was_slow_once_is_forgotten_by_calls_that_come_alone(clock: Clock) -> None:
    one = LoopLag()
    work(one, clock, LoopLag.WINDOW, 1.0)
    one.task_queued()
    slow_s = one.wait_s
    assert slow_s > 0.1
    one.task_started()
    for _ in range(30 * LoopLag.WINDOW):
        assert one.wait_s == 0  # each of them is let in
        work(one, clock, 1, 0.0001)
    one.task_queued()
    assert one.wait_s < slow_s / 100
