"""The load generator measures the waits that queueing theory predicts."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median

import pytest

from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.results.report import MAX_CORE_FRACTION
from server.engines.base import OnDone
from server.images.input_spec import Pixels
from server.repository.manifest import Manifest
from tests.benchmarks.generator import null_server
from tests.support.serving import (
    Mirror,
    loading,
    publish,
    serve,
)

SERVICE_S = 0.025
RATE_HZ = 24.0  # 60 % of the engine's capacity
DURATION_S = 3.0


class Steady(Mirror):
    """Runs batches of one row, one at a time, each in SERVICE_S."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._thread = ThreadPoolExecutor(1)

    def run(self, pixels: Pixels, done: OnDone) -> None:
        self._thread.submit(self._serve, pixels, done)

    def _serve(self, pixels: Pixels, done: OnDone) -> None:
        time.sleep(SERVICE_S)
        super().run(pixels, done)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()


load = loading(Steady, batch_s=SERVICE_S)


def waits_s(due_s: list[float]) -> list[float]:
    """Wait of each call for a server that serves one at a time (Lindley 1952)."""
    waits, free_s = [], 0.0
    for arrival_s in due_s:
        waits.append(max(0.0, free_s - arrival_s))
        free_s = max(free_s, arrival_s) + SERVICE_S
    return waits


async def test_measured_waits_match_those_computed_from_the_same_arrivals(tmp_path: Path) -> None:
    publish(tmp_path, max_batch=1)
    async with serve(tmp_path, load=load) as served:
        plan = Plan(
            target=served.target,
            classes=(RequestClass(model="tiny", deadline_ms=30_000),),
            concurrency=None,
            rate_hz=RATE_HZ,
            seed=3,
            warmup_s=0.0,
            duration_s=DURATION_S,
        )
        report = await measure(plan)
    due = list(takewhile(lambda due_s: due_s < DURATION_S, (due_s for due_s, _ in plan.due())))
    expected = [wait_s + SERVICE_S for wait_s in waits_s(due)]
    samples = report.samples.tolist()
    measured = [finished_s - due_s for due_s, _, finished_s, *_ in samples]
    assert len(measured) == len(due)
    assert max(waits_s(due)) > SERVICE_S, "these arrivals must queue up"
    # Compares sorted times: rounded deadlines may swap two requests.
    ends = sorted(due_s + latency_s for due_s, latency_s in zip(due, expected, strict=True))
    ended = sorted(finished_s for _, _, finished_s, *_ in samples)
    excess = [found - wanted for found, wanted in zip(ended, ends, strict=True)]
    assert min(excess) > -0.001  # no answer is faster than possible
    assert median(excess) < 0.4 * SERVICE_S
    assert fmean(measured) > fmean(expected)


async def test_the_report_says_when_the_generator_is_the_limit() -> None:
    with null_server() as target:
        plan = Plan(
            target=target,
            classes=(RequestClass(model="small", deadline_ms=30_000),),
            concurrency=32,
            warmup_s=0.3,
            duration_s=1.0,
        )
        report = await measure(plan)
    assert report.summary.counts.keys() == {"OK"}
    # Even a busy machine that is ten times slower must reach hundreds, not dozens.
    assert report.summary.calls_hz > 200
    assert report.busiest_worker <= 1.05
    assert report.is_valid == (report.busiest_worker <= MAX_CORE_FRACTION)
    assert report.client_cpu_s_per_call is not None
    assert report.client_cpu_s_per_call * report.sent == pytest.approx(report.client_cpu_s)
