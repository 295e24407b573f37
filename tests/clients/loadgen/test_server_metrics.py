"""The server's own counters agree with the measurement, for both protocols."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Plan, RequestClass
from tests.support.serving import (
    Mirror,
    loading,
    publish,
    serve,
)


@pytest.mark.parametrize("protocol", ["classify", "oip"])
async def test_the_servers_counters_agree_with_the_measurement(
    tmp_path: Path, protocol: Any
) -> None:
    publish(tmp_path, trained=True)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        plan = Plan(
            target=served.target,
            protocol=protocol,
            classes=(RequestClass(model="tiny", images=3, deadline_ms=20_000),),
            concurrency=None,
            rate_hz=100,
            warmup_s=0.3,
            duration_s=0.5,
            metrics_url=served.http + "/metrics",
            server_pids=(os.getpid(),),
        )
        report = await measure(plan)
    assert report.metrics is not None, report.metrics_missing
    assert report.summary.counts.keys() == {"OK"}
    # Counters are read at the edges of the period; calls in flight may count on either side.
    assert abs(report.metrics.calls - report.summary.succeeded) <= 20
    assert report.metrics.images == 3 * report.metrics.calls
    assert report.server.answered_by == {("tiny", "1", True)}
    assert report.metrics.cpu_s is not None
    assert report.server_cpu_s is not None
    assert report.server_cpu_s == pytest.approx(report.metrics.cpu_s, abs=0.3)
    as_json = report.as_json()["server_metrics"]
    assert as_json["phases_ms"]["compute"]["p50"] <= as_json["phases_ms"]["compute"]["p99"]


async def test_unreadable_metrics_are_reported_and_do_not_stop_the_run(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        plan = Plan(
            target=served.target,
            classes=(RequestClass(model="tiny", deadline_ms=20_000),),
            concurrency=1,
            warmup_s=0.0,
            duration_s=0.2,
            metrics_url=served.http + "/healthz",
        )
        report = await measure(plan)
    assert report.metrics is None
    assert "not" in report.metrics_missing
    assert report.summary.succeeded
