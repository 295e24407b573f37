"""Command: cost of the metrics of one request and its batch, and of a scrape.

python -m tests.benchmarks.metrics
"""

import time
from collections.abc import Callable

from server.telemetry.metrics import Metrics


def call_cost_s(calls: int) -> float:
    """Seconds for a request that is alone in its batch and answered in time."""
    metrics = Metrics()
    model = metrics.model("m")
    count = metrics.requests.labels("m", "1", "Classify", "OK")
    duration = metrics.request_duration.labels("m", "1", "Classify")

    def call() -> None:
        model.predicted(0.001)
        model.batch(1, 0.012, 1)
        model.answered(1, 0.0001, 0.002, 0.012, 0.0003)
        count.inc()
        duration.observe(0.0151)

    return _seconds(call, calls)


def render_s() -> float:
    """Seconds for a scrape of ten models."""
    metrics = Metrics()
    for number in range(10):
        metrics.model(f"m{number}").answered(1, 0.0, 0.0, 0.0, 0.0)
    return _seconds(lambda: metrics.render_for("application/openmetrics-text"), 10)


def _seconds(function: Callable[[], object], times: int) -> float:
    began_s = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - began_s) / times


if __name__ == "__main__":
    print(f"one request: {min(call_cost_s(20_000) for _ in range(5)) * 1e6:.2f} us")
    print(f"one scrape of ten models: {min(render_s() for _ in range(3)) * 1e3:.1f} ms")
