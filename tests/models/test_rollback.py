"""A version is sent back for what is its own fault."""

from __future__ import annotations

import pytest

from server.models.rollback import CallCounts, RollbackPolicy
from server.telemetry.metrics import Metrics

GOOD, BAD = CallCounts(100, 2), CallCounts(100, 30)


@pytest.mark.parametrize(
    ("before", "now", "objects"),
    [
        (GOOD, BAD, True),
        (GOOD, GOOD, False),
        (GOOD, CallCounts(100, 10), False),  # a tenth is bearable
        (GOOD, CallCounts(100, 11), True),
        (BAD, BAD, False),  # it is the load
        (CallCounts(100, 6), BAD, False),
        (None, BAD, False),  # nothing to compare with
        (CallCounts(19, 0), BAD, False),
        (GOOD, CallCounts(19, 19), False),  # too few to tell
        (GOOD, CallCounts(20, 20), True),
    ],
)
def test_it_is_held_to_its_objective_where_the_one_before_kept_to_it(
    before: CallCounts | None, now: CallCounts, objects: bool
) -> None:
    objection = RollbackPolicy(10.0, 0.05, before).objection(now)
    assert bool(objection) is objects
    if objects and before == GOOD and now == BAD:
        assert objection == (
            "30% of 100 answers were later than its objective, 50 ms; 2% were of the one before"
        )


def test_it_is_over_when_its_time_is() -> None:
    probation = RollbackPolicy(10.0, 0.05)
    assert [probation.over(now_s) for now_s in (9.9, 10.0, 11.0)] == [False, True, True]


def test_late_calls_are_counted_by_the_whole_of_their_time() -> None:
    counted = Metrics().model("tiny", objective_s=0.1)
    for seconds in ((0.02, 0.03, 0.04, 0.0), (0.02, 0.04, 0.05, 0.0), (0.0, 0.0, 0.3, 0.0)):
        counted.answered(1, *seconds)
    assert (counted.totals.calls, counted.totals.late_calls) == (3, 2)
