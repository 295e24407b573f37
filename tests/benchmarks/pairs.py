"""Statistics of measurements that two sides take in turn.

A machine may slow down during a run, but then it slows down both turns of a pair. So only the two
turns of a pair are compared, and the result is the median over all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles


@dataclass(slots=True)
class Pairs:
    """One figure of both sides. Values with the same index are from adjacent turns."""

    bare: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Served divided by bare, for each pair."""
        return [served / bare for bare, served in zip(self.bare, self.served, strict=True)]

    def differences(self) -> list[float]:
        """Served minus bare, for each pair."""
        return [served - bare for bare, served in zip(self.bare, self.served, strict=True)]


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third
