"""A measurement as it is asked for: whom, what, how often, how long. No I/O but a trace's file."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from convserve_client.loadgen.load import bursts, constant, poisson

Arrivals = Literal["poisson", "constant", "bursts", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of request among those a run sends."""

    model: str
    version: int = 0  # 0 is the newest
    images: int = 1
    priority: int = 0
    deadline_ms: float = 1000.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One measurement, as the command line asks for it."""

    target: str  # HOST:PORT
    kinds: tuple[Kind, ...]
    protocol: Literal["classify", "oip"] = "classify"
    concurrency: int | None = 16  # closed loop with that many callers; None: open loop
    rate_hz: float | None = None  # of the open loop; None: the trace's own
    arrivals: Arrivals = "poisson"
    burst: int = 10  # requests in each of the bursts
    trace: tuple[float, ...] = ()  # due times, repeated until the run is over
    seed: int = 1
    duration_s: float = 10.0
    warmup_s: float = 2.0
    windows: int = 5
    input: str = "raw"
    raw: bool = False  # files are decoded and resized here, and sent as pixels
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # oip: those of tensors by their name
    outputs: tuple[str, ...] = ()  # oip: the tensors asked for; none: all there are
    obey_hints: bool = False  # send again what was refused, when the server says so
    channels: int = 1  # connections of each process
    processes: int = 1
    max_in_flight: int = 1024
    metrics_url: str = ""  # the server's /metrics; empty: not read
    server_pids: tuple[int, ...] = ()  # processes, with their children, whose CPU time is counted

    @property
    def until_s(self) -> float:
        return self.warmup_s + self.duration_s

    @property
    def deadlines_s(self) -> list[float]:
        """By kind."""
        return [kind.deadline_ms / 1000 for kind in self.kinds]

    def due(self, index: int = 0, of: int = 1) -> Iterator[tuple[float, int]]:
        """When requests are due and of which kind, endless; each `of`-th for one of so many
        processes. All together they send what one would."""
        whole = zip(self._times(), self.chosen(self.seed), strict=False)
        return itertools.islice(whole, index, None, of)

    def chosen(self, seed: int) -> Iterator[int]:
        """Kinds by their weights, without end. The same seed gives the same ones."""
        if len(self.kinds) == 1:
            return itertools.repeat(0)
        rng = random.Random(f"kinds {seed}")
        weights = list(itertools.accumulate(kind.weight for kind in self.kinds))
        indices = range(len(self.kinds))
        return (rng.choices(indices, cum_weights=weights)[0] for _ in itertools.count())

    def _times(self) -> Iterator[float]:
        if self.arrivals == "trace":
            return _repeated(self.trace, self.rate_hz)
        assert self.rate_hz is not None
        if self.arrivals == "bursts":
            return bursts(self.rate_hz, self.burst, self.seed)
        if self.arrivals == "constant":
            return constant(self.rate_hz)
        return poisson(self.rate_hz, self.seed)


def _repeated(times: Sequence[float], rate_hz: float | None) -> Iterator[float]:
    """The trace over and over, a mean gap between its end and its beginning; with a rate its
    times are stretched to it."""
    gap_s = times[-1] / (len(times) - 1) if len(times) > 1 and times[-1] > 0 else 1.0
    stretch = 1.0 if rate_hz is None else 1 / (gap_s * rate_hz)
    length_s = times[-1] + gap_s
    return ((turn * length_s + due_s) * stretch for turn in itertools.count() for due_s in times)


def mixed(
    models: Sequence[tuple[str, float]],
    images: Sequence[tuple[int, float]],
    priorities: Sequence[tuple[int, float]],
    deadlines_ms: Sequence[tuple[float, float]],
    version: int = 0,
) -> tuple[Kind, ...]:
    """Every combination of the values, each with its weight; chosen independently of each other."""
    return tuple(
        Kind(
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
