"""Summary of a period of a run: counts, throughput, latency, and how certain they are."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from convserve_client.loadgen.results.samples import (
    NOT_SENT,
    OK,
    REFUSED,
    STATUS_NUMBER,
    STATUSES,
    Array,
    Sample,
    Samples,
)


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Nearest-rank percentiles: each one is the latency of an actual request."""

    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    p999_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class RetryAfterSummary:
    """How often refusals said when to retry, and what the retries achieved."""

    refusals: int  # all of them, including those that a retry followed
    given: int  # requests whose last refusal said when to retry
    obeyed: int  # requests that were sent again
    answered: int  # of those, the ones answered in time


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a period of a run."""

    duration_s: float
    counts: Mapping[str, int]  # requests due in the period, by status
    calls_hz: float  # successes that arrived in the period, whenever they were due
    images_hz: float  # the images in them
    in_time: int  # successes due in the period that arrived within the deadline
    latency: LatencySummary | None  # of the successes due in the period; None without any
    latency_of_all: LatencySummary | None  # of all due requests; unanswered ones are infinite
    lag_p99_s: float | None  # delay of the generator in sending; None if nothing was due
    lag_max_s: float | None = None
    mean_rows: float | None = None  # of the batches, if answers say
    retry_after: RetryAfterSummary = RetryAfterSummary(0, 0, 0, 0)

    @property
    def succeeded(self) -> int:
        return self.counts.get(OK, 0)

    @property
    def late(self) -> int:
        """Answers that came after the deadline."""
        return self.succeeded - self.in_time

    @property
    def refused(self) -> int:
        return sum(count for status, count in self.counts.items() if status in REFUSED)

    @property
    def not_sent(self) -> int:
        return self.counts.get(NOT_SENT, 0)

    @property
    def failed(self) -> int:
        """Neither answered nor refused: an error, a timeout, an unreachable server."""
        return self.total - self.succeeded - self.refused - self.not_sent

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def goodput_hz(self) -> float:
        """Answers in time per second, of the requests due in the period."""
        return self.in_time / self.duration_s


def summarise(
    samples: Iterable[Sample] | Array,
    started_s: float,
    ended_s: float,
    *,
    deadline_s: float | Sequence[float] = math.inf,
) -> Summary:
    """Summary of [started_s, ended_s). Before it is warm-up, after it is drain.

    `deadline_s` counts from the due time: one value for all, or one for each request class.
    Samples may be given as `Samples.columns`.

    A request belongs to the period in which it was due. Throughput counts answers that arrived in
    the period instead, so that requests in flight at its start and end do not distort it.
    """
    if not started_s < ended_s:
        raise ValueError(f"ended_s {ended_s} must be after started_s {started_s}")
    if not isinstance(samples, np.ndarray):
        samples = Samples(samples).columns
    duration_s = ended_s - started_s
    is_ok = samples["status"] == STATUS_NUMBER[OK]
    is_due = _within(samples["due_s"], started_s, ended_s)
    arrived = samples[is_ok & _within(samples["finished_s"], started_s, ended_s)]
    requests, answers = samples[is_due], samples[is_due & is_ok]
    latencies = np.sort(answers["finished_s"] - answers["due_s"])
    unanswered = np.full(len(requests) - len(answers), math.inf)
    lags = np.sort(requests["sent_s"] - requests["due_s"])
    in_time = _is_in_time(answers, deadline_s)
    return Summary(
        duration_s=duration_s,
        counts={
            STATUSES[number]: int(count)
            for number, count in enumerate(np.bincount(requests["status"]))
            if count
        },
        calls_hz=len(arrived) / duration_s,
        images_hz=int(arrived["images"].sum()) / duration_s,
        in_time=int(in_time.sum()),
        latency=_latency_summary(latencies),
        latency_of_all=_latency_summary(np.concatenate([latencies, unanswered])),
        lag_p99_s=percentile(lags, 990) if len(lags) else None,
        lag_max_s=float(lags[-1]) if len(lags) else None,
        mean_rows=mean_batch_rows(answers),
        retry_after=_retry_after_summary(requests, answers[in_time]),
    )


def mean_batch_rows(answers: Array) -> float | None:
    """Mean rows of the batches that carried these samples; None if no answer says.

    Up to n calls see a batch of n rows. Weighted by 1/rows, each batch counts once.
    """
    rows = answers["rows"][answers["rows"] > 0].astype(float)
    return len(rows) / float((1 / rows).sum()) if len(rows) else None


def _within(times: Array, started_s: float, ended_s: float) -> Array:
    return np.asarray((times >= started_s) & (times < ended_s))


def _is_in_time(answers: Array, deadline_s: float | Sequence[float]) -> Array:
    """Which of the successes arrived within the deadline of their request class."""
    limits: Any = (
        deadline_s
        if isinstance(deadline_s, int | float)
        else np.asarray(deadline_s)[answers["request_class"]]
    )
    return np.asarray(answers["finished_s"] - answers["due_s"] <= limits)


def _retry_after_summary(requests: Array, in_time: Array) -> RetryAfterSummary:
    refused = np.isin(requests["status"], [STATUS_NUMBER[status] for status in REFUSED])
    return RetryAfterSummary(
        refusals=int(refused.sum() + (requests["tries"].astype(int) - 1).sum()),
        given=int((requests["retry_after_s"] >= 0).sum()),
        obeyed=int((requests["tries"] > 1).sum()),
        answered=int((in_time["tries"] > 1).sum()),
    )


def _latency_summary(ordered: Array) -> LatencySummary | None:
    if not len(ordered):
        return None
    return LatencySummary(
        p50_s=percentile(ordered, 500),
        p90_s=percentile(ordered, 900),
        p95_s=percentile(ordered, 950),
        p99_s=percentile(ordered, 990),
        p999_s=percentile(ordered, 999),
        max_s=float(ordered[-1]),
    )


def percentile(ordered: Array, permille: int) -> float:
    """The smallest value that is not below `permille` thousandths of the values.

    numpy's percentiles would interpolate, and fail for infinite values.
    """
    rank = -(-len(ordered) * permille // 1000)  # rounded up; integers, as 0.99 * 100 may not be 99
    return float(ordered[max(rank, 1) - 1])


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of a figure over the windows of a run, and its margin."""

    mean: float
    margin: float  # half of the 95 % confidence interval, by Student's t
    windows: int


# Two-sided 95 % points of Student's t by degrees of freedom; above 30 the normal one is close.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate from the windows' values, as if independent; None with fewer than two finite."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return None
    t = _T95[len(finite) - 2] if len(finite) - 2 < len(_T95) else 1.96
    return Estimate(fmean(finite), t * stdev(finite) / math.sqrt(len(finite)), len(finite))


def split_windows(
    samples: Array,
    started_s: float,
    ended_s: float,
    count: int,
    *,
    deadline_s: float | Sequence[float] = math.inf,
) -> list[Summary]:
    """Summaries of `count` equal parts of the period."""
    edges = np.linspace(started_s, ended_s, count + 1).tolist()
    return [
        summarise(samples, low, high, deadline_s=deadline_s)
        for low, high in itertools.pairwise(edges)
    ]
