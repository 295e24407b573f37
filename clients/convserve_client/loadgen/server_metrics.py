"""What a server's counters say of a stretch of time: its metrics, and the kernel's CPU times."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 5.0
PHASES = ("decode", "queue", "compute", "respond")
QUANTILES = {"p50": 0.5, "p99": 0.99}

Labels = frozenset[tuple[str, str]]
Samples = Mapping[tuple[str, Labels], float]


class NoMetrics(Exception):
    """The server's metrics can't be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a histogram gained in a stretch."""

    buckets: tuple[tuple[float, float], ...]  # upper bound and values up to it, by bound
    sum: float

    @property
    def count(self) -> float:
        return self.buckets[-1][1] if self.buckets else 0.0

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Interpolated within its bucket, as Prometheus does; so as exact as the bucket is wide."""
        rank = share * self.count
        low, below = 0.0, 0.0
        for high, up_to in self.buckets:
            if up_to >= rank and up_to > below:
                if high == float("inf"):
                    return low
                return low + (high - low) * (rank - below) / (up_to - below)
            low, below = high, up_to
        return None


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """The server's own account of a stretch, of the models asked for."""

    calls: float  # answered with OK
    refused: float
    deadline_missed: float
    images: float
    cpu_s: float | None  # of all its processes that export it
    compute_s: float
    wasted_compute_s: float
    phases: Mapping[str, Histogram]
    batch_rows: Histogram

    def as_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "refused": self.refused,
            "deadline_missed": self.deadline_missed,
            "images": self.images,
            "cpu_s": self.cpu_s,
            "compute_s": self.compute_s,
            "wasted_compute_s": self.wasted_compute_s,
            "mean_batch_rows": self.batch_rows.mean,
            "phases_ms": {
                phase: {
                    "mean": _ms(histogram.mean),
                    **{name: _ms(histogram.quantile(q)) for name, q in QUANTILES.items()},
                }
                for phase, histogram in self.phases.items()
            },
        }


def fetch(url: str) -> str:
    """The text at /metrics. Raises NoMetrics."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=TIMEOUT_S) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise NoMetrics(f"{url}: {getattr(error, 'reason', error)}") from None


def read(text: str) -> Samples:
    """Raises NoMetrics where it is none of Prometheus's texts."""
    try:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except ValueError as error:
        raise NoMetrics(f"not the text of Prometheus: {error}") from None


def between(before: Samples, after: Samples, models: Collection[str]) -> ServerMetrics:
    """What was counted between two readings. Raises NoMetrics where the server is another one, or
    was started anew between them."""
    if not any(name.startswith("convserve_") for name, _ in after):
        raise NoMetrics("these are not the metrics of convserve")
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    if _starts(before) != _starts(after):
        raise NoMetrics("the server was started anew during the run")

    def total(name: str, **labels: str) -> float:
        return sum(
            value
            for (found, of), value in gained.items()
            if found == name and _matches(of, models, labels)
        )

    cpu = [value for (name, _), value in gained.items() if name == "process_cpu_seconds_total"]
    return ServerMetrics(
        calls=sum(
            total("convserve_requests_total", code="OK", method=method)
            for method in ("Classify", "ModelInfer")
        ),
        refused=total("convserve_refused_total"),
        deadline_missed=total("convserve_deadline_missed_total"),
        images=total("convserve_images_total"),
        cpu_s=sum(cpu) if cpu else None,
        compute_s=total("convserve_compute_seconds_total"),
        wasted_compute_s=total("convserve_wasted_compute_seconds_total"),
        phases={
            phase: _histogram(gained, "convserve_phase_duration_seconds", models, phase=phase)
            for phase in PHASES
        },
        batch_rows=_histogram(gained, "convserve_batch_rows", models),
    )


def _starts(samples: Samples) -> set[float]:
    return {value for (name, _), value in samples.items() if name == "process_start_time_seconds"}


def _histogram(gained: Samples, name: str, models: Collection[str], **labels: str) -> Histogram:
    up_to: dict[float, float] = defaultdict(float)
    total = 0.0
    for (found, of), value in gained.items():
        if not found.startswith(name) or not _matches(of, models, labels):
            continue
        if found == name + "_bucket":
            up_to[float(dict(of)["le"])] += value
        elif found == name + "_sum":
            total += value
    return Histogram(tuple(sorted(up_to.items())), total)


def _matches(of: Labels, models: Collection[str], labels: Mapping[str, str]) -> bool:
    return dict(of).get("model") in models and labels.items() <= dict(of).items()


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, that processes and their living children have used so far.

    Raises ProcessLookupError with the pid where one is not there.
    """
    waiting, seen, total = list(pids), set[int](), 0.0
    while waiting:
        pid = waiting.pop()
        if pid in seen:
            continue
        seen.add(pid)
        try:
            # The name in parentheses may hold anything; what follows it is numbers.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            raise ProcessLookupError(f"there is no process {pid}") from None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
