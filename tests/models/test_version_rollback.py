"""Versions that fail or give wrong answers are rolled back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckResponse

from server.engines import null
from server.errors import EngineFailure
from server.repository.manifest import Manifest
from server.repository.serving_config import ServingConfig, write_serving_config
from tests.support.serving import (
    Mirror,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
    until,
)
from tests.support.versions import (
    metric,
    reasons,
    states,
    wait_for_states,
)


class FailingAfterVersion1(Mirrors):
    """Makes engines that fail, except for version 1."""

    def __call__(self, manifest: Manifest) -> Mirror:
        engine = super().__call__(manifest)
        if manifest.version > 1:
            engine.failure = EngineFailure("the engine is broken")
        return engine


@pytest.mark.parametrize("bake_time_s", [60.0, 0.0])
async def test_a_failed_batch_during_bake_time_rolls_the_version_back(
    tmp_path: Path, bake_time_s: float
) -> None:
    publish(tmp_path)
    engines = FailingAfterVersion1()
    async with serve(tmp_path, load=loading(engines), bake_time_s=bake_time_s) as served:
        publish(tmp_path)
        await wait_for_states(served, {2: "READY"})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.classify(raw(1))
        assert caught.value.code() == StatusCode.INTERNAL
        if not bake_time_s:
            assert (await states(served))[2] == "READY"
            return
        answer = await served.classify(raw(1))  # at once, because version 1 was still loaded
        assert answer.version == 1
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        assert (await reasons(served))[2] == (
            "a batch failed during bake time: the engine is broken"
        )
        assert (
            metric(served, 'convserve_rollbacks_total{model="tiny",reason="engine_failure"}') == 1
        )
        assert engines.made[1].closed
        publish(tmp_path, "other")  # another sync does not bring it back
        await until(served.channel, "other", HealthCheckResponse.SERVING)
        assert await states(served) == {1: "READY", 2: "FAILED"}


async def test_a_failed_golden_check_rolls_the_version_back(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with serve(tmp_path, golden_interval_s=0.05, bake_time_s=0.0) as served:
        engine = served.server.registry.route("tiny").engine
        assert isinstance(engine, null.NullEngine)
        (instance,) = engine.instances
        while not metric(served, 'convserve_golden_checks_total{model="tiny",outcome="passed"}'):
            await asyncio.sleep(0.01)
        classes, scores, probabilities = instance._answer
        instance._answer = (classes[:, ::-1], scores, probabilities[:, ::-1])
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        assert "a repeated golden check failed" in (await reasons(served))[2]
        assert (await served.classify(raw(0))).version == 1
        assert metric(served, 'convserve_rollbacks_total{model="tiny",reason="golden_drift"}') == 1


async def test_the_only_version_stops_serving_after_a_failed_golden_check(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with serve(tmp_path, golden_interval_s=0.05) as served:
        engine = served.server.registry.route("tiny").engine
        assert isinstance(engine, null.NullEngine)
        (instance,) = engine.instances
        classes, scores, probabilities = instance._answer
        instance._answer = (classes[:, ::-1], scores, probabilities[:, ::-1])
        await until(served.channel, "tiny", HealthCheckResponse.NOT_SERVING)
        await until(served.channel, "", HealthCheckResponse.NOT_SERVING)
        await wait_for_states(served, {1: "FAILED"})


async def test_a_failing_canary_is_counted_as_a_rollback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    publish(tmp_path)
    write_serving_config(tmp_path, "tiny", ServingConfig(labels={"canary": 2}, canary_percent=50))
    engines = Mirrors()
    async with serve(tmp_path, load=loading(engines), bake_time_s=60.0) as served:
        await wait_for_states(served, {1: "READY", 2: "READY"})
        canary = engines.made[0]  # the newest version is loaded first
        canary.failure = EngineFailure("the engine is broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await served.classify(raw(0, label="canary"))
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        assert [(await served.classify(raw(0))).version for _ in range(4)] == [1] * 4
        assert (
            metric(served, 'convserve_rollbacks_total{model="tiny",reason="engine_failure"}') == 1
        )
