"""Load on paper: when requests are due, what became of each, what that adds up to.

Times are seconds from the start of the run. No clock, no I/O, no transport in here.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

OK = "OK"  # the status of a success; every other one is a refusal or a failure


def poisson(rate_hz: float, seed: int) -> Iterator[float]:
    """Due times without end, independent of each other. The same seed gives the same times."""
    _check_rate(rate_hz)
    rng = random.Random(seed)
    return itertools.accumulate(rng.expovariate(rate_hz) for _ in itertools.count())


def constant(rate_hz: float) -> Iterator[float]:
    """Due times without end, evenly spaced, the first at 0."""
    _check_rate(rate_hz)
    return (n / rate_hz for n in itertools.count())


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of one request."""

    due_s: float  # when it should have been sent
    sent_s: float
    finished_s: float
    status: str  # OK, or the name of what it ended with
    images: int

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.due_s  # includes the time we were late in sending


@dataclass(frozen=True, slots=True)
class Latency:
    """Nearest-rank percentiles: each one is the latency of a request that there was."""

    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    p999_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stretch of a run adds up to."""

    duration_s: float
    counts: Mapping[str, int]  # requests due in the stretch, by status
    calls_hz: float  # successes that came in during the stretch, whenever they were due
    images_hz: float  # the images in them
    in_time: int  # successes due in the stretch that came within the deadline
    latency: Latency | None  # of the successes due in the stretch; None when there are none
    lag_p99_s: float | None  # how late the generator sent; None when nothing was due

    @property
    def succeeded(self) -> int:
        return self.counts.get(OK, 0)

    @property
    def late(self) -> int:
        """Answers that came after the deadline: the caller had stopped caring."""
        return self.succeeded - self.in_time

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def goodput_hz(self) -> float:
        """Answers in time, of the requests due in the stretch, a second."""
        return self.in_time / self.duration_s


def summarise(
    samples: Iterable[Sample], started_s: float, ended_s: float, *, deadline_s: float = math.inf
) -> Summary:
    """Sums up [started_s, ended_s) of a run; what lies before is warm-up, what lies after is drain.

    `deadline_s` is how long after it was due a request's answer is still in time.

    Requests belong to the stretch they were due in. Throughput counts arrivals of answers instead,
    so that neither the answers still owed at the start nor those at the end bend it.
    """
    if not started_s < ended_s:
        raise ValueError(f"ended_s {ended_s} must be after started_s {started_s}")
    samples = list(samples)
    due = [sample for sample in samples if started_s <= sample.due_s < ended_s]
    arrived = [
        sample
        for sample in samples
        if sample.status == OK and started_s <= sample.finished_s < ended_s
    ]
    duration_s = ended_s - started_s
    latencies = sorted(sample.latency_s for sample in due if sample.status == OK)
    lags = sorted(sample.sent_s - sample.due_s for sample in due)
    return Summary(
        duration_s=duration_s,
        counts=Counter(sample.status for sample in due),
        calls_hz=len(arrived) / duration_s,
        images_hz=sum(sample.images for sample in arrived) / duration_s,
        in_time=sum(latency_s <= deadline_s for latency_s in latencies),
        latency=_latency(latencies) if latencies else None,
        lag_p99_s=_percentile(lags, 990) if lags else None,
    )


def _latency(ordered: list[float]) -> Latency:
    return Latency(
        p50_s=_percentile(ordered, 500),
        p90_s=_percentile(ordered, 900),
        p95_s=_percentile(ordered, 950),
        p99_s=_percentile(ordered, 990),
        p999_s=_percentile(ordered, 999),
        max_s=ordered[-1],
    )


def _percentile(ordered: list[float], permille: int) -> float:
    """The smallest value that at least `permille` thousandths of the values do not exceed."""
    rank = -(-len(ordered) * permille // 1000)  # rounded up, in integers: 0.99 * 100 need not be 99
    return ordered[max(rank, 1) - 1]


def _check_rate(rate_hz: float) -> None:
    if not 0 < rate_hz < float("inf"):
        raise ValueError(f"rate_hz {rate_hz} must be positive and finite")
