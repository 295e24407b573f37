"""Counters of the server over a period: its Prometheus metrics, and CPU times from the kernel."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from convserve_client.loadgen.event_loop import clock
from convserve_client.security.access import PLAIN, Access
from convserve_client.security.tls import https_context
from convserve_client.security.token import bearer, check_secrecy

TIMEOUT_S = 5.0  # of the connection and of each read
BODY_TIMEOUT_S = 10.0
MAX_METRICS_BYTES = 16 << 20
PHASES = ("decode", "queue", "compute", "respond")
QUANTILES = {"p50": 0.5, "p99": 0.99}

Labels = frozenset[tuple[str, str]]
Samples = Mapping[tuple[str, Labels], float]


class NoMetrics(Exception):
    """The server's metrics cannot be read. The message says why."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Increase of a histogram over a period."""

    buckets: tuple[tuple[float, float], ...]  # upper bound, and number of values up to it
    sum: float

    @property
    def count(self) -> float:
        return self.buckets[-1][1] if self.buckets else 0.0

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def quantile(self, fraction: float) -> float | None:
        """Interpolated within a bucket, as Prometheus does: as exact as the bucket is narrow."""
        rank = fraction * self.count
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
    """Increase of the server's counters over a period, for the measured models."""

    calls: float  # answered with OK
    refused: float
    deadline_missed: float
    images: float
    cpu_s: float | None  # of all processes that export it
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


def fetch(url: str, access: Access = PLAIN) -> str:
    """The text at /metrics. Raises NoMetrics.

    The server of the URL gets the token unless others could read it on the way.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirects()]
    address = urlsplit(url)
    if access.tls is not None and address.scheme == "https":
        handlers.append(urllib.request.HTTPSHandler(context=https_context(access.tls)))
    request = urllib.request.Request(url)
    if access.token:
        request.add_header("Authorization", bearer(access.token))
    try:
        check_secrecy(
            address.netloc,
            has_tls=address.scheme == "https",
            allow_plaintext=access.allow_plaintext_token or not access.token,
        )
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S) as response:
            return _read(response).decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise NoMetrics(f"{url}: {getattr(error, 'reason', error)}") from None


def _read(response: Any) -> bytes:
    """The body. Raises ValueError if it is too long, or takes too long."""
    ends_s, body = clock() + BODY_TIMEOUT_S, b""
    while part := response.read1(MAX_METRICS_BYTES):
        body += part
        if len(body) > MAX_METRICS_BYTES:
            raise ValueError(f"the response has more than {MAX_METRICS_BYTES:,} bytes")
        if clock() > ends_s:
            raise ValueError(f"the response takes more than {BODY_TIMEOUT_S:g} s")
    return body


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the token to another server."""

    def redirect_request(self, *args: object) -> None:
        return None


def parse(text: str) -> Samples:
    """Raises NoMetrics if the text is not in the format of Prometheus."""
    try:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except ValueError as error:
        raise NoMetrics(f"the response is not in the format of Prometheus: {error}") from None


def difference(before: Samples, after: Samples, models: Collection[str]) -> ServerMetrics:
    """Increase of the counters between two readings.

    Raises NoMetrics if the server is not convserve, or restarted between the readings.
    """
    if not any(name.startswith("convserve_") for name, _ in after):
        raise NoMetrics("the response has no metrics of convserve")
    gained = {key: value - before.get(key, 0.0) for key, value in after.items()}
    if _start_times(before) != _start_times(after):
        raise NoMetrics("the server restarted during the run")

    def total(name: str, **labels: str) -> float:
        return sum(
            value
            for (found, found_labels), value in gained.items()
            if found == name and _matches(found_labels, models, labels)
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


def _start_times(samples: Samples) -> set[float]:
    return {value for (name, _), value in samples.items() if name == "process_start_time_seconds"}


def _histogram(gained: Samples, name: str, models: Collection[str], **labels: str) -> Histogram:
    up_to: dict[float, float] = defaultdict(float)
    total = 0.0
    for (found, found_labels), value in gained.items():
        if not found.startswith(name) or not _matches(found_labels, models, labels):
            continue
        if found == name + "_bucket":
            up_to[float(dict(found_labels)["le"])] += value
        elif found == name + "_sum":
            total += value
    return Histogram(tuple(sorted(up_to.items())), total)


def _matches(found: Labels, models: Collection[str], labels: Mapping[str, str]) -> bool:
    return dict(found).get("model") in models and labels.items() <= dict(found).items()


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, that processes and their running children have used so far.

    Raises ProcessLookupError with the PID if a process does not exist.
    """
    waiting, seen, total = list(pids), set[int](), 0.0
    while waiting:
        pid = waiting.pop()
        if pid in seen:
            continue
        seen.add(pid)
        try:
            # The process name in parentheses may hold any character; only numbers follow it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            raise ProcessLookupError(f"process {pid} does not exist") from None
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
