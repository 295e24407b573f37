"""Health checks tell the truth, to every watcher."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.api.rpc.health import Health
from server.api.stubs import classify_pb2 as pb
from server.security.principal import LOCAL_CALLER
from tests.api.classify_calls import failure
from tests.support.serving import (
    HeldLoader,
    Mirror,
    Mirrors,
    publish,
    raw,
    serve,
)

CLASSIFIER = pb.DESCRIPTOR.services_by_name["Classifier"]


async def test_health_of_model_and_server_changes_when_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    mirrors = Mirrors()
    status = HealthCheckResponse
    loader = HeldLoader(mirrors)
    async with serve(tmp_path, load=loader, wait=False) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watches = [stub.Watch(HealthCheckRequest(service=name)) for name in ("", "tiny", "alien")]
        seen = [(await watch.read()).status for watch in watches]
        assert seen == [status.NOT_SERVING, status.NOT_SERVING, status.SERVICE_UNKNOWN]
        early = await failure(served.classify(raw(1)))
        assert early.code() == StatusCode.UNAVAILABLE
        assert early.details() == "model 'tiny' version 1 is loading"

        loader.gate.set()
        for watch in watches[:2]:
            assert (await watch.read()).status == status.SERVING
        for name in ("", CLASSIFIER.full_name, "inference.GRPCInferenceService", "tiny"):
            answer = await stub.Check(HealthCheckRequest(service=name))
            assert answer.status == status.SERVING, name
        error = await failure(stub.Check(HealthCheckRequest(service="alien")))
        assert error.code() == StatusCode.NOT_FOUND


async def test_a_watcher_that_leaves_does_not_end_other_watches(tmp_path: Path) -> None:
    publish(tmp_path)
    loader = HeldLoader(Mirror)
    async with serve(tmp_path, load=loader, wait=False) as served:
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        leaving, staying = (stub.Watch(HealthCheckRequest(service="tiny")) for _ in range(2))
        for watch in (leaving, staying):
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        leaving.cancel()
        await served.call(
            "ListModels", pb.ListModelsRequest()
        )  # the cancellation arrives before this call
        loader.gate.set()
        assert (await staying.read()).status == HealthCheckResponse.SERVING


async def test_a_stopping_server_ends_watches_and_reflection_streams(tmp_path: Path) -> None:
    publish(tmp_path)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as server:
        served = await server.enter_async_context(serve(tmp_path, grace_s=40.0))
        async with grpc.aio.insecure_channel(served.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(HealthCheckRequest())
            assert (await watch.read()).status == HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            stream = stub.ServerReflectionInfo()
            await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await stream.read()
            began_s = loop.time()
            await server.aclose()
            assert loop.time() - began_s < 20
            assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
            assert [await watch.code(), await stream.code()] == [StatusCode.OK, StatusCode.OK]


async def test_a_change_during_a_write_reaches_the_watcher_too() -> None:
    health = Health(lambda principal, name: True)
    statuses = health.watch(HealthCheckRequest(), lambda: LOCAL_CALLER)
    assert (await anext(statuses)).status == HealthCheckResponse.SERVING
    health.stop()  # the watch has not returned from its write
    reported = [response.status async for response in statuses]
    assert reported == [HealthCheckResponse.NOT_SERVING]
