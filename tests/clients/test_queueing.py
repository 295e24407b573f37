"""What the instrument measures is what there is: waits that queueing theory knows beforehand."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median

import pytest

from convserve_client.loadgen.measure import BOUND_SHARE, measure
from convserve_client.loadgen.plan import Kind, Plan
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
RATE_HZ = 24.0  # 60 % of what one engine can do
DURATION_S = 3.0


class Steady(Mirror):
    """One batch of one row at a time, each taking SERVICE_S."""

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
    """How long each call waits for a server of one at a time (Lindley 1952)."""
    waits, free_s = [], 0.0
    for arrival_s in due_s:
        waits.append(max(0.0, free_s - arrival_s))
        free_s = max(free_s, arrival_s) + SERVICE_S
    return waits


async def test_measured_waits_are_those_of_the_same_arrivals_on_paper(tmp_path: Path) -> None:
    publish(tmp_path, max_batch=1)
    async with serve(tmp_path, load=load) as served:
        plan = Plan(
            target=served.target,
            kinds=(Kind(model="tiny", deadline_ms=30_000),),
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
    assert max(waits_s(due)) > SERVICE_S, "these arrivals queue up"
    # The n-th to be answered, whoever it is: deadlines come rounded, so two may change places.
    ends = sorted(due_s + latency_s for due_s, latency_s in zip(due, expected, strict=True))
    ended = sorted(finished_s for _, _, finished_s, *_ in samples)
    excess = [found - wanted for found, wanted in zip(ended, ends, strict=True)]
    assert min(excess) > -0.001  # nobody is faster than can be
    assert median(excess) < 0.4 * SERVICE_S
    assert fmean(measured) > fmean(expected)


async def test_the_generator_says_when_a_server_of_nothing_makes_it_the_limit() -> None:
    with null_server() as target:
        plan = Plan(
            target=target,
            kinds=(Kind(model="small", deadline_ms=30_000),),
            concurrency=32,
            warmup_s=0.3,
            duration_s=1.0,
        )
        report = await measure(plan)
    assert report.summary.counts.keys() == {"OK"}
    # Of a machine that is a tenth as fast as ours and busy: it must be hundreds, not dozens.
    assert report.summary.calls_hz > 200
    assert report.sender_share <= 1.05
    assert report.valid == (report.sender_share <= BOUND_SHARE)
    assert report.client_cpu_s_per_call is not None
    assert report.client_cpu_s_per_call * report.sent == pytest.approx(report.client_cpu_s)
