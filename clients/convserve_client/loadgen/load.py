"""Load on paper: when requests are due, what became of each, what that adds up to.

Times are seconds from the start of the run. No clock, no I/O, no transport in here.
"""

import itertools
import math
import random
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean, stdev
from typing import Any

import numpy as np

OK = "OK"  # the status of a success; every other one is a refusal or a failure
NOT_SENT = (
    "NOT_SENT"  # due while as many requests as allowed were unanswered; never left the client
)
REFUSED = frozenset({"RESOURCE_EXHAUSTED"})  # the server chose not to; all others are failures
# In gRPC's order, so that a status is its number; what never became a call has one of its own.
STATUSES = (
    *(OK, "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    *("UNAUTHENTICATED", NOT_SENT),
)
NUMBER = {status: number for number, status in enumerate(STATUSES)}

Array = np.ndarray[Any, Any]


# --- when requests are due -------------------------------------------------------------------


def poisson(rate_hz: float, seed: int) -> Iterator[float]:
    """Due times without end, independent of each other. The same seed gives the same times."""
    _check_rate(rate_hz)
    rng = random.Random(seed)
    return itertools.accumulate(rng.expovariate(rate_hz) for _ in itertools.count())


def constant(rate_hz: float) -> Iterator[float]:
    """Due times without end, evenly spaced, the first at 0."""
    _check_rate(rate_hz)
    return (n / rate_hz for n in itertools.count())


def bursts(rate_hz: float, size: int, seed: int) -> Iterator[float]:
    """Due times without end, `size` of them at a time at Poisson moments, `rate_hz` in all."""
    _check_rate(rate_hz)
    if size < 1:
        raise ValueError(f"a burst of {size} is none; it has at least 1 request")
    moments = poisson(rate_hz / size, seed)
    return (due_s for due_s in moments for _ in range(size))


def trace(lines: Iterable[str]) -> list[float]:
    """Due times as a file lists them, a number of seconds a line, the first taken as 0.

    Empty lines and those that begin with "#" are passed over. Raises ValueError, with the line.
    """
    times: list[float] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        try:
            due_s = float(text)
        except ValueError:
            raise ValueError(f"line {number}: {text[:40]!r} is no number of seconds") from None
        if not math.isfinite(due_s) or (times and due_s < times[-1]):
            raise ValueError(f"line {number}: {text} does not follow the time before it")
        times.append(due_s)
    if not times:
        raise ValueError("there is no time in it")
    return [due_s - times[0] for due_s in times]


# --- what became of each ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of one request."""

    due_s: float  # when it should have been sent
    sent_s: float
    finished_s: float
    status: str  # one of STATUSES
    images: int
    kind: int = 0  # index of what was asked, where a run asks several things
    tries: int = 1  # how often it was sent, the server's hints to try again obeyed
    hint_s: float = -1.0  # what the last refusal said to wait; below 0: it said nothing
    rows: float = 0.0  # mean rows of the batches that carried it; 0: the answer does not tell

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.due_s  # includes the time we were late in sending


_RECORD = struct.Struct("<dddffIHBB")
_COLUMNS = np.dtype(
    [
        *[(name, "<f8") for name in ("due_s", "sent_s", "finished_s")],
        *[("hint_s", "<f4"), ("rows", "<f4"), ("images", "<u4")],
        *[("kind", "<u2"), ("status", "u1"), ("tries", "u1")],
    ]
)


class Samples:
    """Any number of samples in 40 bytes each, which go from process to process as they are."""

    def __init__(self, samples: Iterable[Sample] = (), packed: bytes = b"") -> None:
        self._packed = bytearray(packed)
        for sample in samples:
            self.add(*(getattr(sample, field.name) for field in fields(Sample)))

    def add(
        self,
        due_s: float,
        sent_s: float,
        finished_s: float,
        status: str,
        images: int,
        kind: int = 0,
        tries: int = 1,
        hint_s: float = -1.0,
        rows: float = 0.0,
    ) -> None:
        """A sample, its values as those of Sample."""
        self._packed += _RECORD.pack(
            *(due_s, sent_s, finished_s, hint_s, rows, images, kind),
            *(NUMBER[status], min(tries, 255)),
        )

    def extend(self, packed: bytes) -> None:
        """The samples that another's `packed` gave."""
        self._packed += packed

    @property
    def packed(self) -> bytes:
        return bytes(self._packed)

    @property
    def columns(self) -> Array:
        """A copy, with the fields of a sample as its columns; `status` is an index of STATUSES."""
        return np.frombuffer(bytes(self._packed), _COLUMNS)

    def __len__(self) -> int:
        return len(self._packed) // _RECORD.size

    def __iter__(self) -> Iterator[Sample]:
        for record in _RECORD.iter_unpack(self.packed):
            due_s, sent_s, finished_s, hint_s, rows, images, kind, status, tries = record
            yield Sample(
                *(due_s, sent_s, finished_s, STATUSES[status], images, kind, tries, hint_s, rows)
            )


# --- what that adds up to --------------------------------------------------------------------


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
class Hints:
    """What came of the server's hints to try again after a while."""

    refusals: int  # refused for good, and refused at first
    given: int  # requests whose last refusal had a hint
    obeyed: int  # requests sent again after one
    answered: int  # of those, the ones that were answered in time


@dataclass(frozen=True, slots=True)
class Summary:
    """What a stretch of a run adds up to."""

    duration_s: float
    counts: Mapping[str, int]  # requests due in the stretch, by status
    calls_hz: float  # successes that came in during the stretch, whenever they were due
    images_hz: float  # the images in them
    in_time: int  # successes due in the stretch that came within the deadline
    latency: Latency | None  # of the successes due in the stretch; None when there are none
    latency_of_all: Latency | None  # of all that were due; no answer at all is infinitely late
    lag_p99_s: float | None  # how late the generator sent; None when nothing was due
    lag_max_s: float | None = None
    mean_rows: float | None = None  # of the batches of the successes, where answers tell
    hints: Hints = field(default=Hints(0, 0, 0, 0))

    @property
    def succeeded(self) -> int:
        return self.counts.get(OK, 0)

    @property
    def late(self) -> int:
        """Answers that came after the deadline: the caller had stopped caring."""
        return self.succeeded - self.in_time

    @property
    def refused(self) -> int:
        return sum(count for status, count in self.counts.items() if status in REFUSED)

    @property
    def not_sent(self) -> int:
        return self.counts.get(NOT_SENT, 0)

    @property
    def failed(self) -> int:
        """Neither answered nor refused: broken, too late, unreachable."""
        return self.total - self.succeeded - self.refused - self.not_sent

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def goodput_hz(self) -> float:
        """Answers in time, of the requests due in the stretch, a second."""
        return self.in_time / self.duration_s


def summarise(
    samples: Iterable[Sample] | Array,
    started_s: float,
    ended_s: float,
    *,
    deadline_s: float | Sequence[float] = math.inf,
) -> Summary:
    """Sums up [started_s, ended_s) of a run; what lies before is warm-up, what lies after is drain.

    `deadline_s` is how long after it was due a request's answer is still in time, one for all or
    one for each kind. Samples may be given as `Samples.columns`.

    Requests belong to the stretch they were due in. Throughput counts arrivals of answers instead,
    so that neither the answers still owed at the start nor those at the end bend it.
    """
    if not started_s < ended_s:
        raise ValueError(f"ended_s {ended_s} must be after started_s {started_s}")
    if not isinstance(samples, np.ndarray):
        samples = Samples(samples).columns
    duration_s = ended_s - started_s
    good = samples["status"] == NUMBER[OK]
    due = _within(samples["due_s"], started_s, ended_s)
    arrived = samples[good & _within(samples["finished_s"], started_s, ended_s)]
    asked, answers = samples[due], samples[due & good]
    latencies = np.sort(answers["finished_s"] - answers["due_s"])
    lags = np.sort(asked["sent_s"] - asked["due_s"])
    rows = answers["rows"][answers["rows"] > 0].astype(float)
    in_time = _in_time(answers, deadline_s)
    return Summary(
        duration_s=duration_s,
        counts={
            STATUSES[number]: int(count)
            for number, count in enumerate(np.bincount(asked["status"]))
            if count
        },
        calls_hz=len(arrived) / duration_s,
        images_hz=int(arrived["images"].sum()) / duration_s,
        in_time=int(in_time.sum()),
        latency=_latency(latencies) if len(latencies) else None,
        latency_of_all=_latency(
            np.concatenate([latencies, np.full(len(asked) - len(answers), math.inf)])
        )
        if len(asked)
        else None,
        lag_p99_s=percentile(lags, 990) if len(lags) else None,
        lag_max_s=float(lags[-1]) if len(lags) else None,
        # A batch of n rows is seen by up to n calls: weighted by 1/rows, each counts once.
        mean_rows=len(rows) / float((1 / rows).sum()) if len(rows) else None,
        hints=_hints(asked, answers[in_time]),
    )


def _within(times: Array, started_s: float, ended_s: float) -> Array:
    return np.asarray((times >= started_s) & (times < ended_s))


def _in_time(answers: Array, deadline_s: float | Sequence[float]) -> Array:
    """Which of the successes came within the deadline of their kind."""
    limits: Any = (
        deadline_s
        if isinstance(deadline_s, int | float)
        else np.asarray(deadline_s)[answers["kind"]]
    )
    return np.asarray(answers["finished_s"] - answers["due_s"] <= limits)


def _hints(asked: Array, in_time: Array) -> Hints:
    refused = np.isin(asked["status"], [NUMBER[status] for status in REFUSED])
    return Hints(
        refusals=int(refused.sum() + (asked["tries"].astype(int) - 1).sum()),
        given=int((asked["hint_s"] >= 0).sum()),
        obeyed=int((asked["tries"] > 1).sum()),
        answered=int((in_time["tries"] > 1).sum()),
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure's mean over windows of a run, and how sure that is."""

    mean: float
    margin: float  # half of the 95 % confidence interval, by Student's t
    windows: int


# Two-sided 95 % points of Student's t, by degrees of freedom; beyond 30 the normal one is near.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of the windows' values, taken to be independent; None where fewer than two are finite."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return None
    t = _T95[len(finite) - 2] if len(finite) - 2 < len(_T95) else 1.96
    return Estimate(fmean(finite), t * stdev(finite) / math.sqrt(len(finite)), len(finite))


def windows(
    samples: Array,
    started_s: float,
    ended_s: float,
    count: int,
    *,
    deadline_s: float | Sequence[float] = math.inf,
) -> list[Summary]:
    """The stretch in `count` equal ones, each summed up."""
    edges = np.linspace(started_s, ended_s, count + 1).tolist()
    return [
        summarise(samples, low, high, deadline_s=deadline_s)
        for low, high in itertools.pairwise(edges)
    ]


def _latency(ordered: Array) -> Latency:
    return Latency(
        p50_s=percentile(ordered, 500),
        p90_s=percentile(ordered, 900),
        p95_s=percentile(ordered, 950),
        p99_s=percentile(ordered, 990),
        p999_s=percentile(ordered, 999),
        max_s=float(ordered[-1]),
    )


def percentile(ordered: Array, permille: int) -> float:
    """The smallest value that at least `permille` thousandths of the values do not exceed."""
    rank = -(-len(ordered) * permille // 1000)  # rounded up, in integers: 0.99 * 100 need not be 99
    return float(ordered[max(rank, 1) - 1])


def _check_rate(rate_hz: float) -> None:
    if not 0 < rate_hz < float("inf"):
        raise ValueError(f"rate_hz {rate_hz} must be positive and finite")
