"""Requests above a limit are refused with a time to retry."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from google.rpc.error_details_pb2 import RetryInfo
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest

from server.api.stubs import classify_pb2 as pb
from tests.api.classify_calls import best, details, eventually, failure, metric, trailers
from tests.support.serving import (
    Mirrors,
    loading,
    publish,
    raw,
    serve,
)


async def test_a_refusal_under_load_has_a_time_to_retry(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(
        tmp_path, load=loading(mirrors), queue_rows=4, max_images_per_call=4
    ) as served:
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        waiting = asyncio.create_task(served.classify(raw(1, 2, 3, 4)))
        (executor,) = {model.executor for model in served.server.registry.serving_models()}
        await eventually(lambda: executor.queued_rows("tiny/1") == 4)
        error = await failure(served.classify(raw(1)))
        registry = served.server.metrics.registry
        refusals = metric(registry, "convserve_refused_total", model="tiny", reason="overloaded")
        mirrors.made[0].release()
        assert best(await running) == [1]
        assert best(await waiting) == [1, 2, 3, 4]
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert details(error).details[0].Unpack(retry)
    assert details(error).message == error.details()
    wait_ms = retry.retry_delay.ToMilliseconds()
    pushback = trailers(error)["grpc-retry-pushback-ms"]
    assert 0 < wait_ms <= int(pushback) <= wait_ms + 1
    assert refusals == 1


async def test_the_bytes_of_requests_in_progress_are_limited(tmp_path: Path) -> None:
    publish(tmp_path, shape=(64, 64, 3))
    mirrors = Mirrors(held=True)
    bound = 64 * 64 * 3 * 3 // 2  # of one and a half requests
    async with serve(
        tmp_path,
        load=loading(mirrors),
        max_message_bytes=bound,
        max_bytes_in_progress=bound,
    ) as served:
        large = raw(1, shape=(64, 64, 3))
        running = asyncio.create_task(served.classify(large))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        error = await failure(served.classify(large))
        await served.call("ListModels", pb.ListModelsRequest())  # a small request still fits
        mirrors.made[0].release()
        assert best(await running) == [1]
        assert best(await served.classify(large)) == [1]
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "bytes" in (error.details() or "")


async def test_calls_above_the_limit_are_refused_at_once(tmp_path: Path) -> None:
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(tmp_path, load=loading(mirrors), max_calls=2) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(HealthCheckRequest())
        await watch.read()
        running = asyncio.create_task(served.classify(raw(1)))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        for _ in range(10):  # refused calls do not make room
            error = await failure(served.classify(raw(2)))
            assert error.code() == StatusCode.RESOURCE_EXHAUSTED
            assert "2 calls are in progress" in str(error.details())
        late = stub.Watch(HealthCheckRequest())
        assert await late.code() == StatusCode.RESOURCE_EXHAUSTED
        metadata = {key: value for key, value in await late.trailing_metadata()}
        assert metadata["grpc-retry-pushback-ms"] == "100", "the same as for any other call"
        mirrors.made[0].release()
        assert best(await running) == [1]
        assert best(await served.classify(raw(2))) == [2]
