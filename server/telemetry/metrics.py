"""All Prometheus instruments of the server.

Label values come from closed sets, never from a client's text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.telemetry.histogram import BufferedHistogram
from server.telemetry.log_writer import dropped_log_lines
from server.telemetry.nvml import GpuMonitor
from server.telemetry.principal_metrics import PrincipalMetrics

# `_created` series would double the number of counters and histograms; no query uses them.
disable_created_metrics()  # type: ignore[no-untyped-call]

PHASES = ("decode", "queue", "compute", "respond")

# Methods that run a model. Only their latency has a version, because a histogram is 33 series.
INFERENCE_METHODS = ("Classify", "ModelInfer", "ModelStreamInfer")

# Steps of 1.5 to 2 from 100 us to 10 s. A p99 read from these buckets is at most a third wrong.
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


ENGINE_LABELS = ("model", "version", "backend", "precision", "weights")

# (model, version, code, if any) -> series with these labels bound. Binding them costs 1 us.
BoundSeries = dict[tuple[str, ...], Any]


class Metrics:
    """All instruments of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._bound: list[BoundSeries] = []
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(_DroppedLogLines())

        make = _Factory(registry)
        counter, gauge, histogram = make.counter, make.gauge, make.histogram

        # Requests. Labels model and version are empty if the request named no known model.
        text = "Requests by status. model and version are empty if the model is unknown."
        self.requests = counter("requests", text, "model", "version", "method", "code")
        text = "Time from arrival to response of successful requests. Only inference has a version."
        self.request_duration = histogram(
            "request_duration_seconds", text, SECONDS, "model", "version", "method"
        )
        text = "Time of successful requests by phase: decode, queue, compute, respond."
        self.phase_duration = histogram("phase_duration_seconds", text, SECONDS, "model", "phase")
        self.images = counter("images", "Images classified.", "model")
        text = "Requests refused before any work was done. model is empty if it is unknown."
        self.refused = counter("refused", text, "model", "reason")
        text = "Requests whose deadline passed, by their stage at that time."
        self.deadline_missed = counter("deadline_missed", text, "model", "stage")
        text = "Predicted minus actual completion time."
        self.prediction_error = histogram("prediction_error_seconds", text, ERRORS, "model")

        self.batch_rows = histogram("batch_rows", "Images per batch.", ROWS, "model")
        text = "Rows computed only to fill a batch to a size that the engine has."
        self.padded_rows = counter("padded_rows", text, "model")
        self.compute = counter("compute_seconds", "Compute time of batches.", "model")
        text = "Compute time of results that no client received."
        self.wasted = counter("wasted_compute_seconds", text, "model")

        self.connections_cut, self.tls_handshakes = _connection_counters(make)
        self.auth_failures, self.auth_file_refused = _access_instruments(make)
        self.principals = PrincipalMetrics(registry)

        # Versions and engines.
        text = "1 if the version answers requests, 0 if it is known but does not."
        self.ready = gauge("model_ready", text, "model", "version")
        text = "1 for the version's current state, 0 for the others."
        self.state = gauge("model_state", text, "model", "version", "state")
        text = "Switches of a model's requests to another version."
        self.version_switches = counter("version_switches", text, "model")
        text = "Versions rolled back after they had answered requests, by reason."
        self.rollbacks = counter("rollbacks", text, "model", "reason")
        text = "Periodic golden checks by outcome: passed, failed, skipped."
        self.golden_checks = counter("golden_checks", text, "model", "outcome")
        text = "1 for each engine in use. weights is trained or untrained."
        self.engine_info = gauge("engine_info", text, *ENGINE_LABELS)
        text = "1 if a preferred engine of the version was skipped. backend is the one in use."
        self.engine_fallback = gauge("engine_fallback", text, "model", "version", "backend")
        text = "Time to load the engine: hashes, compilation, golden check, warm-up."
        self.engine_load = gauge("engine_load_seconds", text, "model")

    def model(self, name: str, objective_s: float = math.inf) -> ModelMetrics:
        """The instruments of one model, with its labels bound."""
        return ModelMetrics(self, name, objective_s)

    def bound_series(self) -> BoundSeries:
        """A new, empty cache of series with bound labels."""
        self._bound.append({})
        return self._bound[-1]

    def forget_latency(self, model: str, version: str) -> None:
        """Deletes the latency series of a version that is not loaded any more."""
        self._forget(self.request_duration, model, version)

    def forget_requests(self, model: str, version: str) -> None:
        """Deletes all series that count the requests of a version that is gone."""
        self._forget(self.request_duration, model, version)
        self._forget(self.requests, model, version)

    def forget_model(self, model: str) -> None:
        """Deletes all series of a model that is gone."""
        for instrument in vars(self).values():
            if isinstance(instrument, MetricWrapperBase) and "model" in instrument._labelnames:
                instrument.remove_by_labels({"model": model})
        for bound in self._bound:
            for key in [key for key in bound if key[0] == model]:
                del bound[key]

    def _forget(self, instrument: Counter | Histogram, model: str, version: str) -> None:
        instrument.remove_by_labels({"model": model, "version": version})
        for bound in self._bound:
            for key in [key for key in bound if key[:2] == (model, version)]:
                del bound[key]

    def read_queue_rows(self, read: Callable[[], dict[str, int]]) -> None:
        """Exports convserve_queue_rows{model}; `read` is called at each scrape."""
        self._read("convserve_queue_rows", "Images that wait for an engine.", "model", read)

    def read_busy(self, read: Callable[[], dict[str, float]]) -> None:
        """Exports convserve_device_busy_ratio{device}; `read` is called at each scrape."""
        self._read(
            "convserve_device_busy_ratio",
            "Fraction of the device's units at work over the last seconds, 0 to 1.",
            "device",
            read,
        )

    def read_connections(self, read: Callable[[], dict[str, int]]) -> None:
        """Exports convserve_connections{port}; `read` is called at each scrape."""
        self._read("convserve_connections", "Open connections.", "port", read)

    def read_tls(self, expires: Callable[[], float], is_refusing: Callable[[], float]) -> None:
        """Exports the certificate's end, as Unix time, and whether new files were refused."""
        for name, help, read in (
            ("certificate_expiry_timestamp_seconds", "End of the certificate in use.", expires),
            (
                "files_refused",
                "1 while the TLS files on disk can't be used; earlier ones are.",
                is_refusing,
            ),
        ):
            gauge = Gauge(f"convserve_tls_{name}", help, registry=self.registry)
            gauge.set_function(read)

    def read_gpus(self, gpus: GpuMonitor) -> None:
        """Exports the readings of NVML for each GPU."""
        for name, help, read in (
            (
                "busy_ratio",
                "Fraction of the last sampling period in which a kernel ran.",
                gpus.busy_ratio,
            ),
            ("memory_used_bytes", "GPU memory in use by all processes.", gpus.memory_used),
            ("memory_total_bytes", "GPU memory in total.", gpus.memory_total),
            ("power_watts", "Power draw.", gpus.power_watts),
            ("temperature_celsius", "Temperature of the GPU.", gpus.temperature),
        ):
            self._read(f"convserve_gpu_{name}", help, "gpu", read)

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def format_for(self, accept: str) -> str:
        """The content type that an Accept header leads to; there are a few."""
        return choose_encoder(accept)[1]

    def render_for(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, in the best format that the Accept header allows.

        OpenMetrics is preferred because only it has exemplars.
        """
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


class _Factory:
    """Makes instruments with the server's prefix in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"convserve_{name}", help, labels, registry=self._registry)

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"convserve_{name}", help, labels, registry=self._registry)

    def histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return BufferedHistogram(
            f"convserve_{name}", help, labels, buckets=buckets, registry=self._registry
        )


def _connection_counters(make: _Factory) -> tuple[Counter, Counter]:
    text = "Connections that the server refused or cut, by port and reason."
    cut = make.counter("connections_cut", text, "port", "reason")
    text = "TLS handshakes by port (grpc, http) and outcome."
    return cut, make.counter("tls_handshakes", text, "port", "outcome")


def _access_instruments(make: _Factory) -> tuple[Counter, Gauge]:
    text = "Calls without a valid credential or without the permission for their method."
    failures = make.counter("auth_failures", text, "reason")
    text = "1 if the auth file on disk is broken and its previous content is in use."
    return failures, make.gauge("auth_file_refused", text)


class _DroppedLogLines:
    """Exports convserve_log_lines_dropped of the process."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        text = "Log lines dropped because the reader of the log is too slow or gone."
        yield CounterMetricFamily("convserve_log_lines_dropped", text, value=dropped_log_lines())

    def describe(self) -> Iterator[CounterMetricFamily]:
        return self.collect()


@dataclass(slots=True)
class Totals:
    """Totals of one version since it was loaded, for the statistics RPC."""

    images: int = 0
    batches: dict[int, tuple[int, float]] = field(
        default_factory=dict
    )  # number and seconds of batches, by rows
    calls: int = 0  # successful ones
    late_calls: int = 0  # successful, but later than the model's latency objective
    phases_s: list[float] = field(
        default_factory=lambda: [0.0] * len(PHASES)
    )  # of successful calls
    last_s: float = 0.0  # Unix time of the last successful call
    failed_calls: int = 0
    failed_s: float = 0.0


class ModelMetrics:
    """Records the calls and batches of one version of a model.

    The instruments are shared by all versions of the model; `totals` is the version's own.
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
        for reason in ("overloaded", "quota", "deadline_unreachable"):
            metrics.refused.labels(model, reason)  # start at 0, so that rate() sees the first one
        for reason in ("engine_failure", "objective", "golden_drift", "stalled"):
            metrics.rollbacks.labels(model, reason)
        for outcome in ("passed", "failed", "skipped"):
            metrics.golden_checks.labels(model, outcome)
        for stage in ("decode", "queue", "compute"):
            metrics.deadline_missed.labels(model, stage)

    def answered(self, images: int, *seconds: float) -> None:
        """Records a successful call: its images, and its seconds in the order of PHASES."""
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
        """Records a failed call that took `seconds`."""
        self.totals.failed_calls += 1
        self.totals.failed_s += seconds

    def batch(self, rows: int, seconds: float, computed: int) -> None:
        """Records a batch of `rows` rows, for which the device computed `computed` rows."""
        batches, spent_s = self.totals.batches.get(rows, (0, 0.0))
        self.totals.batches[rows] = (batches + 1, spent_s + seconds)
        self._batch_rows.observe(rows)
        if computed > rows:
            self._padded_rows.inc(computed - rows)
        self._compute.inc(seconds)

    def device_used(self, principal: str, seconds: float) -> None:
        """Records the part of a batch that a principal's rows took."""
        self._metrics.principals.device_used(principal, seconds)

    def wasted(self, seconds: float) -> None:
        self._wasted.inc(seconds)

    def predicted(self, error_s: float) -> None:
        self._prediction_error.observe(error_s)

    def refused(self, reason: str) -> None:
        self._metrics.refused.labels(self.model, reason).inc()

    def deadline_missed(self, stage: str) -> None:
        self._metrics.deadline_missed.labels(self.model, stage).inc()
