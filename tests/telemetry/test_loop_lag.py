"""The predicted wait for the event loop, in virtual time."""

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


def run_tasks(lag: LoopLag, clock: Clock, tasks: int, task_s: float) -> None:
    """Queues some tasks at once, then starts one after the other."""
    for _ in range(tasks):
        lag.task_queued()
    for _ in range(tasks):
        clock.now_s += task_s
        lag.task_started()


def test_the_wait_is_the_number_of_queued_tasks_times_the_recent_time_per_task(
    clock: Clock,
) -> None:
    lag = LoopLag()
    for _ in range(20):
        run_tasks(lag, clock, LoopLag.WINDOW, 0.001)
    assert lag.wait_s == 0
    for _ in range(5):
        lag.task_queued()
    assert lag.wait_s == pytest.approx(0.005, rel=0.05)
    lag.task_cancelled()
    assert lag.wait_s == pytest.approx(0.004, rel=0.05)


def test_idle_time_does_not_count(clock: Clock) -> None:
    lag = LoopLag()
    for _ in range(1000):
        run_tasks(lag, clock, 2, 0.001)
        clock.now_s += 1.0
    lag.task_queued()
    assert lag.wait_s == pytest.approx(0.001, rel=0.05)


def test_a_cancelled_task_adds_its_waiting_time_but_is_not_counted(clock: Clock) -> None:
    lag = LoopLag()
    for _ in range(1000):
        lag.task_queued()
        lag.task_queued()
        clock.now_s += 0.001
        lag.task_cancelled()
        clock.now_s += 0.001
        lag.task_started()
    lag.task_queued()
    assert lag.wait_s == pytest.approx(0.002, rel=0.05)


def test_single_tasks_replace_an_old_slow_measurement(clock: Clock) -> None:
    lag = LoopLag()
    run_tasks(lag, clock, LoopLag.WINDOW, 1.0)
    lag.task_queued()
    slow_s = lag.wait_s
    assert slow_s > 0.1
    lag.task_started()
    for _ in range(30 * LoopLag.WINDOW):
        assert lag.wait_s == 0  # so the next task is not refused
        run_tasks(lag, clock, 1, 0.0001)
    lag.task_queued()
    assert lag.wait_s < slow_s / 100
