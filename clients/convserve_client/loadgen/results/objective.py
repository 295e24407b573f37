"""Objectives of a run, and the search for the highest rate that meets them. No I/O.

    p99<15ms   goodput>=200   in_time>99%   refused<1%   failed<=0

Percentiles are taken over all due requests. A request without an answer counts as infinitely late,
so a server cannot meet an objective by refusing. Percentages are of the due requests.
"""

import math
import operator
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from convserve_client.loadgen.results.summary import LatencySummary, Summary

_LATENCIES = {
    "p50": "p50_s",
    "p90": "p90_s",
    "p95": "p95_s",
    "p99": "p99_s",
    "p99.9": "p999_s",
    "max": "max_s",
}
_RATES = {"goodput": "goodput_hz", "calls": "calls_hz", "images": "images_hz"}
_SHARES = ("in_time", "late", "refused", "failed", "not_sent")
_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_SYNTAX = re.compile(r"([a-z_]+[0-9.]*)\s*(<=|>=|<|>)\s*([0-9.]+)\s*(us|ms|s|%)?")


@dataclass(frozen=True, slots=True)
class Objective:
    """Limit for one figure of a summary."""

    text: str
    figure: str  # p99, goodput, refused, ...
    sign: str
    limit: float  # in seconds, calls or images per second, or a fraction of 1

    def value(self, summary: Summary) -> float:
        """The figure in the unit of the limit; the worst value if nothing was due."""
        if self.figure in _LATENCIES:
            latency: LatencySummary | None = summary.latency_of_all
            return getattr(latency, _LATENCIES[self.figure]) if latency else math.inf
        if self.figure in _RATES:
            return float(getattr(summary, _RATES[self.figure]))
        if not summary.total:
            return math.inf if self.sign in ("<", "<=") else -math.inf
        return float(getattr(summary, self.figure) / summary.total)

    def is_met(self, summary: Summary) -> bool:
        return bool(_COMPARISONS[self.sign](self.value(summary), self.limit))

    def format(self, value: float) -> str:
        """A value of the figure with its unit."""
        if not math.isfinite(value):
            return "no answer"
        if self.figure in _LATENCIES:
            return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.3g} s"
        return f"{value:,.1f} /s" if self.figure in _RATES else f"{value:.3%}"


def parse_objective(text: str) -> Objective:
    """Raises ValueError with what is allowed."""
    found = _SYNTAX.fullmatch(text.strip())
    figures = [*_LATENCIES, *_RATES, *_SHARES]
    if found is None or found[1] not in figures:
        raise ValueError(
            f"{text!r} is not an objective; write FIGURE<LIMIT or FIGURE>LIMIT, as in p99<15ms "
            f"or in_time>99%. Figures: {', '.join(figures)}"
        )
    figure, sign, number, unit = found.groups()
    try:
        limit = float(number)
    except ValueError:
        raise ValueError(f"{text!r}: {number} is not a number") from None
    allowed = tuple(_UNITS_S) if figure in _LATENCIES else ("%", None) if figure in _SHARES else ()
    if figure in _RATES and unit is not None:
        raise ValueError(f"{text!r}: {figure} is a number per second and takes no unit")
    if allowed and unit not in allowed:
        units = ", ".join(name for name in allowed if name)
        raise ValueError(f"{text!r}: {figure} needs one of the units {units}")
    limit *= _UNITS_S.get(unit, 0.01 if unit == "%" else 1.0)
    return Objective(text.strip(), figure, sign, limit)


def all_met(objectives: Sequence[Objective], summary: Summary) -> bool:
    return all(objective.is_met(summary) for objective in objectives)


def highest_rate(
    start_hz: float, *, tolerance: float = 0.03, max_tries: int = 40
) -> Generator[float, bool, float | None]:
    """Yields rates to try. Send back whether each was met. Returns the highest rate that was met.

    Doubles or halves the rate until a met rate is below a missed one, then bisects until the two
    are within `tolerance`. Returns None if nothing is met, down to 1/64 of the start.
    """
    met_hz, missed_hz = 0.0, math.inf
    rate_hz = start_hz
    for _ in range(max_tries):
        if (yield rate_hz):
            met_hz = max(met_hz, rate_hz)
        else:
            missed_hz = min(missed_hz, rate_hz)
        if met_hz and missed_hz <= met_hz * (1 + tolerance):
            break
        if math.isinf(missed_hz):
            rate_hz = 2 * met_hz
        elif not met_hz:
            rate_hz = missed_hz / 2
            if rate_hz < start_hz / 64:
                break
        else:
            rate_hz = math.sqrt(met_hz * missed_hz)
    return met_hz or None
