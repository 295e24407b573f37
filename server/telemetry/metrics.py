"""Every instrument, once. Labels are closed sets, never a caller's text."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.values import ValueClass

from server.telemetry.nvml import GpuMonitor

# They would be a series beside each counter and histogram, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

PHASES = ("decode", "queue", "compute", "respond")

# Steps of 1.5 to 2 from 100 us to 10 s: a p99 read off them is within a third of the truth.
SECONDS = (
    *(0.0001, 0.00015, 0.0002, 0.0003, 0.0005, 0.0007),
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.007),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
ERRORS = (
    *(-1.0, -0.3, -0.1, -0.03, -0.01, -0.003, -0.001),
    *(0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class BufferedHistogram(Histogram):
    """A histogram that sorts values into its buckets some at a time, and all before it is read.

    One value costs 0.25 us instead of 0.9 so (31 buckets). Used on one thread only. Labels must
    have been given.
    """

    TOGETHER = 64

    def _metric_init(self) -> None:
        super()._metric_init()
        self._waiting: list[float] = []
        # Other processes' values are read from files, where none may be missing.
        self._most = 1 if getattr(ValueClass, "_multiprocess", False) else self.TOGETHER

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self._waiting.append(amount)
        if exemplar:
            bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
            bucket.set_exemplar(Exemplar(exemplar, amount, time.time()))
        if len(self._waiting) >= self._most:
            self._sort()

    def _sort(self) -> None:
        values, self._waiting = self._waiting, []
        self._sum.inc(sum(values))
        for index, count in Counted([bisect_left(self._upper_bounds, v) for v in values]).items():
            self._buckets[index].inc(count)

    def _child_samples(self) -> Iterable[Sample]:
        self._sort()
        samples = super()._child_samples()
        if self._upper_bounds[0] < 0:  # OpenMetrics allows no count then, as there is no sum
            return [sample for sample in samples if sample.name != "_count"]
        return samples


class Metrics:
    """The instruments of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "convserve_requests",
            "Calls answered, by status; model and version are empty where none was found.",
            ["model", "version", "method", "code"],
            registry=registry,
        )
        self.request_duration = BufferedHistogram(
            "convserve_request_duration_seconds",
            "From a call's arrival to its answer, successful calls only.",
            ["model", "method"],
            buckets=SECONDS,
            registry=registry,
        )
        self.phase_duration = BufferedHistogram(
            "convserve_phase_duration_seconds",
            "Where the time of a successful call went.",
            ["model", "phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "convserve_images", "Images classified.", ["model"], registry=registry
        )
        self.batch_rows = BufferedHistogram(
            "convserve_batch_rows", "Rows in a batch.", ["model"], buckets=ROWS, registry=registry
        )
        self.padded_rows = Counter(
            "convserve_padded_rows",
            "Rows computed for nobody, to fill a batch up to a size that its engine has.",
            ["model"],
            registry=registry,
        )
        self.compute = Counter(
            "convserve_compute_seconds",
            "Seconds of engines at work, each batch counted once.",
            ["model"],
            registry=registry,
        )
        self.refused = Counter(
            "convserve_refused",
            "Calls refused before any work was done for them; model is empty where none was known.",
            ["model", "reason"],
            registry=registry,
        )
        self.deadline_missed = Counter(
            "convserve_deadline_missed",
            "Calls whose deadline passed, by where they were then.",
            ["model", "stage"],
            registry=registry,
        )
        self.wasted = Counter(
            "convserve_wasted_compute_seconds",
            "Seconds of engines at work for answers that nobody got.",
            ["model"],
            registry=registry,
        )
        self.prediction_error = BufferedHistogram(
            "convserve_prediction_error_seconds",
            "When an answer was expected at admission, less when its engine was done.",
            ["model"],
            buckets=ERRORS,
            registry=registry,
        )
        self.ready = Gauge(
            "convserve_model_ready",
            "1 where the version answers calls, 0 where it is known but does not.",
            ["model", "version"],
            registry=registry,
        )
        self.state = Gauge(
            "convserve_model_state",
            "1 for the state a version is in, 0 for the others.",
            ["model", "version", "state"],
            registry=registry,
        )
        self.swaps = Counter(
            "convserve_version_switches",
            "Times that a model's calls were moved to another version.",
            ["model"],
            registry=registry,
        )
        self.rollbacks = Counter(
            "convserve_rollbacks",
            "Versions given up for another one after they had begun to answer, by what was wrong.",
            ["model", "reason"],
            registry=registry,
        )
        self.golden_checks = Counter(
            "convserve_golden_checks",
            "Times that golden inputs were run again, by whether the answers were right.",
            ["model", "outcome"],
            registry=registry,
        )
        self.engine_info = Gauge(
            "convserve_engine_info",
            "1 for each engine in use; weights is trained or untrained.",
            ["model", "version", "backend", "precision", "weights"],
            registry=registry,
        )
        self.engine_fallback = Gauge(
            "convserve_engine_fallback",
            "1 where a better engine of the version was passed over; backend is what serves.",
            ["model", "version", "backend"],
            registry=registry,
        )
        self.engine_load = Gauge(
            "convserve_engine_load_seconds",
            "How long loading took: hashes, compilation, golden check, warm-up.",
            ["model"],
            registry=registry,
        )

    def model(self, name: str, objective_s: float = math.inf) -> ModelMetrics:
        """The instruments of one model, their labels bound once."""
        return ModelMetrics(self, name, objective_s)

    def read_queue_rows(self, read: Callable[[], dict[str, int]]) -> None:
        """Exports convserve_queue_rows{model} by asking `read` whenever metrics are collected."""
        self._read("convserve_queue_rows", "Images waiting for an engine.", "model", read)

    def read_busy(self, read: Callable[[], dict[str, float]]) -> None:
        """Exports convserve_device_busy_ratio{device} likewise."""
        self._read(
            "convserve_device_busy_ratio",
            "Share of the device's units at work over the last seconds, 0 to 1.",
            "device",
            read,
        )

    def read_gpus(self, gpus: GpuMonitor) -> None:
        """Exports what NVML tells of each GPU, likewise."""
        for name, help, read in (
            ("busy_ratio", "Share of the last moment in which some kernel ran.", gpus.busy_ratio),
            ("memory_used_bytes", "Memory in use, by whomever.", gpus.memory_used),
            ("memory_total_bytes", "Memory there is.", gpus.memory_total),
            ("power_watts", "Power drawn.", gpus.power_watts),
            ("temperature_celsius", "Temperature of the chip.", gpus.temperature),
        ):
            self._read(f"convserve_gpu_{name}", help, "gpu", read)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def render_for(self, accept: str) -> tuple[bytes, str]:
        """That, in the best form that a reader's Accept names, and its content type: OpenMetrics
        where it is one of them, as only that has exemplars."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _read(
        self,
        name: str,
        help: str,
        label: str,
        read: Callable[[], dict[str, int] | dict[str, float]],
    ) -> None:
        class Collector:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                family = GaugeMetricFamily(name, help, labels=[label])
                for value, number in read().items():
                    family.add_metric([value], number)
                yield family

            def describe(self) -> Iterator[GaugeMetricFamily]:
                yield GaugeMetricFamily(name, help, labels=[label])

        self.registry.register(Collector())


@dataclass(slots=True)
class Totals:
    """What one version has done since it was loaded, for callers who ask by RPC."""

    images: int = 0
    batches: dict[int, tuple[int, float]] = field(default_factory=dict)  # and seconds, by rows
    calls: int = 0  # answered
    late_calls: int = 0  # of those, later than the model's objective
    phases_s: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))  # of those calls
    last_s: float = 0.0  # when the last of them was, since 1970
    failed_calls: int = 0
    failed_s: float = 0.0


class ModelMetrics:
    """What is recorded for each call and batch of one version of a model.

    The instruments are the model's, `totals` the version's own.
    """

    def __init__(self, metrics: Metrics, model: str, objective_s: float = math.inf) -> None:
        self.model = model
        self._objective_s = objective_s
        self.totals = Totals()
        self._metrics = metrics
        self._phases = [metrics.phase_duration.labels(model, phase).observe for phase in PHASES]
        self._images = metrics.images.labels(model)
        self._batch_rows = metrics.batch_rows.labels(model)
        self._padded_rows = metrics.padded_rows.labels(model)
        self._compute = metrics.compute.labels(model)
        self._wasted = metrics.wasted.labels(model)
        self._prediction_error = metrics.prediction_error.labels(model)
        for reason in ("overloaded", "deadline_unreachable"):
            metrics.refused.labels(model, reason)  # from 0, so that the first one is seen to rise
        for reason in ("engine_failure", "objective", "golden_drift", "stalled"):
            metrics.rollbacks.labels(model, reason)
        for outcome in ("passed", "failed", "skipped"):
            metrics.golden_checks.labels(model, outcome)
        for stage in ("decode", "queue", "compute"):
            metrics.deadline_missed.labels(model, stage)

    def answered(self, images: int, *seconds: float) -> None:
        """A call of so many images, and its seconds in the order of PHASES."""
        self._images.inc(images)
        totals = self.totals
        totals.images += images
        totals.calls += 1
        totals.late_calls += sum(seconds) > self._objective_s
        totals.last_s = time.time()
        spent_s = totals.phases_s
        for phase, value in enumerate(seconds):
            self._phases[phase](value)
            spent_s[phase] += value

    def failed(self, seconds: float) -> None:
        """A call that got no answer, and when it knew so."""
        self.totals.failed_calls += 1
        self.totals.failed_s += seconds

    def batch(self, rows: int, seconds: float, computed: int) -> None:
        """A batch of so many rows, for which the device computed as many or more."""
        batches, spent_s = self.totals.batches.get(rows, (0, 0.0))
        self.totals.batches[rows] = (batches + 1, spent_s + seconds)
        self._batch_rows.observe(rows)
        if computed > rows:
            self._padded_rows.inc(computed - rows)
        self._compute.inc(seconds)

    def wasted(self, seconds: float) -> None:
        self._wasted.inc(seconds)

    def predicted(self, error_s: float) -> None:
        self._prediction_error.observe(error_s)

    def refused(self, reason: str) -> None:
        self._metrics.refused.labels(self.model, reason).inc()

    def deadline_missed(self, stage: str) -> None:
        self._metrics.deadline_missed.labels(self.model, stage).inc()
