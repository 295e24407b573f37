"""The estimate of the response delay."""

from __future__ import annotations

import math

import pytest

from server.execution.response_delay import ResponseDelayEstimator


def test_the_delay_is_the_mean_plus_four_times_the_mean_deviation() -> None:
    estimator = ResponseDelayEstimator()
    assert estimator.batch_deadline_s(1.0, 0.0) == 1.0 - ResponseDelayEstimator.WIRE_S
    for _ in range(200):
        estimator.record(0.002, 0.0)
    assert 1.0 - estimator.batch_deadline_s(1.0, 0.0) == pytest.approx(0.003, abs=1e-4)
    estimator.record(0.010, 0.0)
    assert 1.0 - estimator.batch_deadline_s(1.0, 0.0) > 0.006
    assert estimator.batch_deadline_s(math.inf, 0.0) == math.inf
    assert estimator.batch_deadline_s(-0.5, 0.0) == -0.5  # the deadline has passed


def test_after_a_pause_requests_with_short_deadlines_are_admitted_again() -> None:
    """A pause of 50 ms must not exclude deadlines of 20 ms: only they can show that it is over."""
    estimator = ResponseDelayEstimator()
    for _ in range(200):
        estimator.record(0.050, 0.0)
    deadline_s = estimator.batch_deadline_s(0.020, 0.0)
    assert deadline_s == pytest.approx(0.010)  # half of the time that is left
    assert estimator.batch_deadline_s(1.0, 0.0) == pytest.approx(1.0 - 0.051, abs=1e-3)
    later_s = 6 * ResponseDelayEstimator.HALF_LIFE_S
    deadline_s = estimator.batch_deadline_s(later_s + 1.0, later_s)
    assert deadline_s == pytest.approx(later_s + 0.998, abs=1e-3)
