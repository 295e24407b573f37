"""Decides whether a new version is worse than the version it replaced.

A version answers only after its golden check, so the remaining faults appear under real requests.
During bake time a version is rolled back if a batch fails, or if it misses its latency objective
while the previous version met it. If both miss it, the cause is load, not the version.

Pure: counts and the time are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_REQUESTS = 20  # with fewer requests the late ratio says nothing
MAX_LATE_RATIO = 0.1  # above this a version misses its objective
MAX_PREVIOUS_LATE_RATIO = 0.05  # at or below this the previous version met its objective


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Requests that a version answered since it was loaded."""

    total: int = 0
    late: int = 0  # of the total, answered later than the latency objective

    @property
    def late_ratio(self) -> float:
        return self.late / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class RollbackPolicy:
    """Bake time of one version: when it ends and what it is compared with."""

    ends_s: float  # on the clock that `has_ended` gets
    objective_s: float
    previous: RequestCounts | None = None  # of the replaced version; None if there was none

    def has_ended(self, now_s: float) -> bool:
        return now_s >= self.ends_s

    def violation(self, counts: RequestCounts) -> str:
        """Why a version with these counts must be rolled back; empty if it may stay."""
        previous = self.previous
        if previous is None or previous.total < MIN_REQUESTS or counts.total < MIN_REQUESTS:
            return ""
        if counts.late_ratio <= MAX_LATE_RATIO or previous.late_ratio > MAX_PREVIOUS_LATE_RATIO:
            return ""
        return (
            f"{counts.late_ratio:.0%} of {counts.total} requests missed the latency objective of "
            f"{self.objective_s * 1e3:g} ms; with the previous version {previous.late_ratio:.0%} "
            "missed it"
        )
