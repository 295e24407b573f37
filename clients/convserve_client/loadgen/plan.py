"""Plan of one measurement: target, requests, rate and duration. No I/O."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from convserve_client.loadgen.arrivals import bursts, constant, poisson, repeat_trace
from convserve_client.security.access import PLAIN, Access

Arrivals = Literal["poisson", "constant", "bursts", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Requests with the same model, size, priority and deadline, and their share of the load."""

    model: str
    version: int = 0  # 0 is the newest
    images: int = 1
    priority: int = 0
    deadline_ms: float = 1000.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings of one measurement."""

    target: str  # HOST:PORT
    classes: tuple[RequestClass, ...]
    protocol: Literal["classify", "oip"] = "classify"
    concurrency: int | None = 16  # number of callers in a closed loop; None: open loop
    rate_hz: float | None = None  # of the open loop; None: the trace's own rate
    arrivals: Arrivals = "poisson"
    burst: int = 10  # requests in each burst
    trace: tuple[float, ...] = ()  # due times, repeated until the end of the run
    seed: int = 1
    duration_s: float = 10.0
    warmup_s: float = 2.0
    windows: int = 5
    input: str = "raw"
    raw: bool = False  # decode and resize files in the load generator, send pixels
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # oip: shapes of tensors by name
    outputs: tuple[str, ...] = ()  # oip: requested tensors; empty: all
    obey_retry_after: bool = False  # send a refused request again when the server says so
    channels: int | None = None  # connections of each process; None: as many as its calls need
    processes: int = 1
    max_in_flight: int = 1024
    access: Access = PLAIN
    metrics_url: str = ""  # the server's /metrics; empty: not read
    server_pids: tuple[int, ...] = ()  # CPU time is counted for them and their children

    @property
    def until_s(self) -> float:
        return self.warmup_s + self.duration_s

    @property
    def deadlines_s(self) -> list[float]:
        """One for each request class."""
        return [request_class.deadline_ms / 1000 for request_class in self.classes]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(request_class.model for request_class in self.classes))

    def due(self, index: int = 0, workers: int = 1) -> Iterator[tuple[float, int]]:
        """Endless due times with the index of the request class, for worker `index`.

        All workers together send what a single one would send.
        """
        whole = zip(self._times(), self.class_indices(self.seed), strict=False)
        return itertools.islice(whole, index, None, workers)

    def class_indices(self, seed: int) -> Iterator[int]:
        """Endless random indices of request classes, by weight. The same seed repeats them."""
        if len(self.classes) == 1:
            return itertools.repeat(0)
        rng = random.Random(f"kinds {seed}")  # this text makes old results repeatable
        weights = list(itertools.accumulate(one.weight for one in self.classes))
        indices = range(len(self.classes))
        return (rng.choices(indices, cum_weights=weights)[0] for _ in itertools.count())

    def _times(self) -> Iterator[float]:
        if self.arrivals == "trace":
            return repeat_trace(self.trace, self.rate_hz)
        assert self.rate_hz is not None
        if self.arrivals == "bursts":
            return bursts(self.rate_hz, self.burst, self.seed)
        if self.arrivals == "constant":
            return constant(self.rate_hz)
        return poisson(self.rate_hz, self.seed)


def combine(
    models: Sequence[tuple[str, float]],
    images: Sequence[tuple[int, float]],
    priorities: Sequence[tuple[int, float]],
    deadlines_ms: Sequence[tuple[float, float]],
    version: int = 0,
) -> tuple[RequestClass, ...]:
    """A request class for each combination of the values. Its weight is the product of theirs."""
    return tuple(
        RequestClass(
            model=model,
            version=version,
            images=count,
            priority=priority,
            deadline_ms=deadline_ms,
            weight=math.prod(weights),
        )
        for (model, *a), (count, *b), (priority, *c), (deadline_ms, *d) in itertools.product(
            models, images, priorities, deadlines_ms
        )
        for weights in [(*a, *b, *c, *d)]
    )
