"""Due times of requests in an open loop, in seconds from the start of a run. No clock, no I/O."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence


def poisson(rate_hz: float, seed: int) -> Iterator[float]:
    """Endless Poisson arrivals. The same seed gives the same times."""
    _check_rate(rate_hz)
    rng = random.Random(seed)
    return itertools.accumulate(rng.expovariate(rate_hz) for _ in itertools.count())


def constant(rate_hz: float) -> Iterator[float]:
    """Endless arrivals at equal intervals, the first at 0."""
    _check_rate(rate_hz)
    return (n / rate_hz for n in itertools.count())


def bursts(rate_hz: float, size: int, seed: int) -> Iterator[float]:
    """Endless bursts of `size` requests; bursts arrive as Poisson. `rate_hz` counts requests."""
    _check_rate(rate_hz)
    if size < 1:
        raise ValueError(f"a burst of {size} requests is not possible; the minimum is 1")
    moments = poisson(rate_hz / size, seed)
    return (due_s for due_s in moments for _ in range(size))


def read_trace(lines: Iterable[str]) -> list[float]:
    """Due times from a file with one number of seconds per line. The first becomes 0.

    Skips empty lines and comments, which start with "#". Raises ValueError with the line.
    """
    times: list[float] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        try:
            due_s = float(text)
        except ValueError:
            raise ValueError(f"line {number}: {text[:40]!r} is not a number of seconds") from None
        if not math.isfinite(due_s) or (times and due_s < times[-1]):
            raise ValueError(f"line {number}: {text} is not finite or is before the previous time")
        times.append(due_s)
    if not times:
        raise ValueError("the file contains no times")
    return [due_s - times[0] for due_s in times]


def repeat_trace(times: Sequence[float], rate_hz: float | None) -> Iterator[float]:
    """Endless repetition of a trace, with a mean gap between its end and its start.

    With a rate, the times are stretched so that the mean rate matches it.
    """
    gap_s = times[-1] / (len(times) - 1) if len(times) > 1 and times[-1] > 0 else 1.0
    stretch = 1.0 if rate_hz is None else 1 / (gap_s * rate_hz)
    length_s = times[-1] + gap_s
    return ((turn * length_s + due_s) * stretch for turn in itertools.count() for due_s in times)


def _check_rate(rate_hz: float) -> None:
    if not 0 < rate_hz < float("inf"):
        raise ValueError(f"rate_hz {rate_hz} must be positive and finite")
