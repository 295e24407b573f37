"""Times a function that runs again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any


def time_runs(seconds: float, run: Callable[[], Any]) -> list[float]:
    """The seconds of each run. Runs for at least `seconds` and at least ten times."""
    for _ in range(3):
        run()
    found: list[float] = []
    ends_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < ends_s or len(found) < 10:
        run()
        found.append(time.perf_counter() - began_s)
    return found


def percentiles(latencies_s: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": 1e3 * median(latencies_s), "p99_ms": 1e3 * quantiles(latencies_s, n=100)[98]}
