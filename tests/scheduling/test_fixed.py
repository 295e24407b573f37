"""The fixed scheduler."""

from __future__ import annotations

import pytest

from server.scheduling.base import Request
from server.scheduling.fixed import FixedScheduler
from tests.scheduling.driver import ONE, enqueue, start
from tests.simulator.scenarios import MODEL


def test_a_batch_starts_at_its_size_or_after_its_delay() -> None:
    scheduler = FixedScheduler(1, 100, size=4, delay_s=0.002)
    scheduler.add(MODEL, ONE.groups, objective_s=0.1)
    enqueue(scheduler, Request(1, 0.0, 10.0))
    assert scheduler.next_batch(0.0) is None
    assert scheduler.next_wake_s(0.0) == pytest.approx(0.002)
    assert start(scheduler, 0.002).rows == 1
