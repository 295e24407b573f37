"""Whether a version that has just begun to answer is worse than the one before it.

It has its golden answers by then; what is left to go wrong shows under real calls only. A version
is given up where its engine fails, or where it breaks its latency objective and the one before kept
to it: where both break it, it is the load that does.

Pure: it is told what was counted, and the time.
"""

from __future__ import annotations

from dataclasses import dataclass

CALLS = 20  # fewer say nothing of how slow a version is
LATE = 0.1  # share of calls later than the objective that breaks it
KEPT = 0.05  # share up to which it is kept


@dataclass(frozen=True, slots=True)
class CallCounts:
    """What was counted of a version's calls."""

    calls: int = 0  # answered
    late: int = 0  # of those, later than the objective

    @property
    def late_share(self) -> float:
        return self.late / self.calls if self.calls else 0.0


@dataclass(frozen=True, slots=True)
class RollbackPolicy:
    """The time in which a version can be sent back."""

    ends_s: float  # on the clock that `over` is asked by
    objective_s: float
    before: CallCounts | None = (
        None  # of the version it took the place of; None where there is none
    )

    def over(self, now_s: float) -> bool:
        return now_s >= self.ends_s

    def objection(self, record: CallCounts) -> str:
        """Why a version of which so much was counted is to be given up; empty where it isn't."""
        if self.before is None or self.before.calls < CALLS or record.calls < CALLS:
            return ""
        if record.late_share <= LATE or self.before.late_share > KEPT:
            return ""
        return (
            f"{record.late_share:.0%} of {record.calls} answers were later than its objective, "
            f"{self.objective_s * 1e3:g} ms; {self.before.late_share:.0%} were of the one before"
        )
