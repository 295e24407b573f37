"""BufferedHistogram reports the same values as Prometheus's own histogram."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.telemetry.histogram import BufferedHistogram
from server.telemetry.metrics import SECONDS


def test_buffered_values_reach_the_same_buckets_as_single_ones() -> None:
    registries = []
    for histogram_type in (Histogram, BufferedHistogram):
        registries.append(CollectorRegistry())
        histogram = histogram_type("h", "any", ["model"], buckets=SECONDS, registry=registries[-1])
        observe = histogram.labels("m").observe
        for n in range(1000):
            observe((n % 37) * 0.00137)
        for edge in (*SECONDS, 0.0, 11.0, float("inf")):
            observe(edge)
            generate_latest(registries[-1])  # each scrape includes all earlier values
    assert generate_latest(registries[0]) == generate_latest(registries[1])
