"""A version is rolled back only for its own faults."""

from __future__ import annotations

import pytest

from server.models.rollback import RequestCounts, RollbackPolicy
from server.telemetry.metrics import Metrics

GOOD, BAD = RequestCounts(100, 2), RequestCounts(100, 30)


@pytest.mark.parametrize(
    ("previous", "now", "is_violation"),
    [
        (GOOD, BAD, True),
        (GOOD, GOOD, False),
        (GOOD, RequestCounts(100, 10), False),  # exactly the limit
        (GOOD, RequestCounts(100, 11), True),
        (BAD, BAD, False),  # the load is the cause
        (RequestCounts(100, 6), BAD, False),
        (None, BAD, False),  # nothing to compare with
        (RequestCounts(19, 0), BAD, False),
        (GOOD, RequestCounts(19, 19), False),  # too few requests
        (GOOD, RequestCounts(20, 20), True),
    ],
)
def test_a_version_must_meet_its_objective_if_the_previous_one_met_it(
    previous: RequestCounts | None, now: RequestCounts, is_violation: bool
) -> None:
    violation = RollbackPolicy(10.0, 0.05, previous).violation(now)
    assert bool(violation) is is_violation
    if is_violation and previous == GOOD and now == BAD:
        assert violation == (
            "30% of 100 requests missed the latency objective of 50 ms; "
            "with the previous version 2% missed it"
        )


def test_the_bake_time_ends() -> None:
    policy = RollbackPolicy(10.0, 0.05)
    assert [policy.has_ended(now_s) for now_s in (9.9, 10.0, 11.0)] == [False, True, True]


def test_a_request_is_late_if_the_sum_of_its_phases_exceeds_the_objective() -> None:
    counted = Metrics().model("tiny", objective_s=0.1)
    for seconds in ((0.02, 0.03, 0.04, 0.0), (0.02, 0.04, 0.05, 0.0), (0.0, 0.0, 0.3, 0.0)):
        counted.answered(1, *seconds)
    assert (counted.totals.calls, counted.totals.late_calls) == (3, 2)
