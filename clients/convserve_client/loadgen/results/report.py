"""Report of one measurement: its figures, and whether they are valid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import PHASES, AnswerTotals
from convserve_client.loadgen.results.samples import Array
from convserve_client.loadgen.results.summary import (
    Estimate,
    Summary,
    estimate,
    split_windows,
    summarise,
)
from convserve_client.loadgen.server_metrics import ServerMetrics

# A generator that sends late adds to the latency that it measures. Allowed at p99: a fraction of
# the measured p99 latency, within these bounds.
MAX_LAG_FRACTION = 0.1
MIN_LAG_LIMIT_S, MAX_LAG_LIMIT_S = 0.001, 0.01
MAX_CORE_FRACTION = 0.92  # above, the callers of a closed loop wait for their own process

Figures = Mapping[str, Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one measurement."""

    plan: Plan
    samples: Array  # `Samples.columns`
    ended_s: float
    server: AnswerTotals
    worker_cpu_s: tuple[float, ...]  # of each process
    request_bytes: float
    connections: int  # of all processes, at most at one time
    interrupted: bool = False
    metrics: ServerMetrics | None = None
    metrics_missing: str = ""  # why there are none although they were requested
    server_cpu_s: float | None = None  # from the kernel, with --server-pid

    @cached_property
    def summary(self) -> Summary:
        return self._summarise(self.samples)

    @cached_property
    def by_class(self) -> list[Summary]:
        return [
            self._summarise(self.samples[self.samples["request_class"] == index])
            for index in range(len(self.plan.classes))
        ]

    @cached_property
    def windows(self) -> list[Summary]:
        return split_windows(
            self.samples,
            self.plan.warmup_s,
            self._measured_to_s,
            self.plan.windows,
            deadline_s=self.plan.deadlines_s,
        )

    @property
    def confidence(self) -> Figures:
        """Means of the main figures over the windows, with their 95 % margin."""

        def over_windows(figure: Callable[[Summary], float | None]) -> Estimate | None:
            values = [figure(window) for window in self.windows]
            return estimate([value for value in values if value is not None])

        return {
            "calls_hz": over_windows(lambda one: one.calls_hz),
            "goodput_hz": over_windows(lambda one: one.goodput_hz),
            "p50_ms": over_windows(lambda one: one.latency.p50_s * 1e3 if one.latency else None),
            "p99_ms": over_windows(lambda one: one.latency.p99_s * 1e3 if one.latency else None),
        }

    @property
    def faults(self) -> list[str]:
        """Why the run is not valid: it did not send the load of the plan. Empty if it did."""
        summary, found = self.summary, []
        if self.plan.concurrency is None and summary.lag_p99_s is not None:
            p99_s = summary.latency.p99_s if summary.latency else 0.0
            limit_s = min(max(MIN_LAG_LIMIT_S, MAX_LAG_FRACTION * p99_s), MAX_LAG_LIMIT_S)
            if summary.lag_p99_s > limit_s:
                found.append(
                    f"the generator could not keep up: it sent {summary.lag_p99_s * 1e3:.2f} ms"
                    " late (p99); try more --processes"
                )
        if summary.not_sent:
            found.append(
                f"{summary.not_sent:,} requests were not sent because"
                f" {self.plan.max_in_flight} were in flight (--max-in-flight)"
            )
        if self.plan.concurrency is not None and self.busiest_worker > MAX_CORE_FRACTION:
            found.append(
                f"a worker process used {self.busiest_worker:.0%} of a core, so this is the"
                " speed of the generator, not of the server; try more --processes"
            )
        return found

    @property
    def is_valid(self) -> bool:
        return not self.faults

    @property
    def busiest_worker(self) -> float:
        """Fraction of a core that the busiest worker process used."""
        return max(self.worker_cpu_s, default=0.0) / self.summary.duration_s

    @property
    def client_cpu_s(self) -> float:
        return sum(self.worker_cpu_s)

    @property
    def sent(self) -> int:
        return self.summary.total - self.summary.not_sent

    @property
    def client_cpu_s_per_call(self) -> float | None:
        return self.client_cpu_s / self.sent if self.sent else None

    @property
    def server_cpu_s_per_call(self) -> float | None:
        """From the kernel's counters, or else from the server's own."""
        cpu_s = self.server_cpu_s
        if cpu_s is None and self.metrics is not None:
            cpu_s = self.metrics.cpu_s
        return None if cpu_s is None or not self.sent else cpu_s / self.sent

    @property
    def loop(self) -> str:
        return "open" if self.plan.concurrency is None else "closed"

    @property
    def _measured_to_s(self) -> float:
        # An interrupt during the warm-up leaves an empty period, which cannot be summarised.
        return max(self.ended_s, self.plan.warmup_s + 1e-9)

    def _summarise(self, samples: Array) -> Summary:
        return summarise(
            samples, self.plan.warmup_s, self._measured_to_s, deadline_s=self.plan.deadlines_s
        )

    def as_json(self) -> dict[str, Any]:
        """The report with units in the names. Values that were not measured are null."""
        plan = asdict(self.plan)
        del plan["trace"], plan["access"]  # the latter holds a secret
        return {
            **plan,
            "tls": self.plan.access.tls is not None,
            "loop": self.loop,
            "request_bytes": round(self.request_bytes),
            "connections": self.connections,
            "interrupted": self.interrupted,
            "valid": self.is_valid,
            "faults": self.faults,
            **figures(self.summary),
            "confidence_95": {
                name: None if found is None else asdict(found)
                for name, found in self.confidence.items()
            },
            "by_class": [
                {**asdict(request_class), **figures(part)}
                for request_class, part in zip(self.plan.classes, self.by_class, strict=True)
            ],
            "client_cpu_s": self.client_cpu_s,
            "client_cpu_s_per_call": self.client_cpu_s_per_call,
            "client_busiest_process": self.busiest_worker,
            **self._server_as_json(),
        }

    def _server_as_json(self) -> dict[str, Any]:
        server = self.server
        return {
            "server_cpu_s": self.server_cpu_s,
            "server_cpu_s_per_call": self.server_cpu_s_per_call,
            "answered_by": [
                {"model": model, "version": version, "trained": trained}
                for model, version, trained in sorted(server.answered_by, key=str)
            ],
            "server_mean_ms": {
                phase: spent_ms / server.answers
                for phase, spent_ms in zip(PHASES, server.phases_ms, strict=True)
            }
            if server.answers
            else None,
            "server_mean_batch_rows": self.summary.mean_rows,
            "server_metrics": None if self.metrics is None else self.metrics.as_json(),
            "server_metrics_missing": self.metrics_missing or None,
        }


def figures(summary: Summary) -> dict[str, Any]:
    """A summary with units in the names."""
    latency = asdict(summary.latency) if summary.latency else {}
    return {
        "measured_s": summary.duration_s,
        "counts": dict(summary.counts),
        "in_time": summary.in_time,
        "late": summary.late,
        "refused": summary.refused,
        "failed": summary.failed,
        "goodput_hz": summary.goodput_hz,
        "calls_hz": summary.calls_hz,
        "images_hz": summary.images_hz,
        "latency_ms": {name.removesuffix("_s"): s * 1000 for name, s in latency.items()},
        "lag_p99_ms": None if summary.lag_p99_s is None else summary.lag_p99_s * 1000,
        "lag_max_ms": None if summary.lag_max_s is None else summary.lag_max_s * 1000,
        "retry_after": asdict(summary.retry_after),
    }
