"""Before it stops, a server reports NOT_SERVING for a while and still answers requests."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc import StatusCode
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tests.support import triton_clients as triton
from tests.support.server_process import (
    next_event,
    server_process,
    stoppable,
    wait_until_not_ready,
)
from tests.support.serving import Mirror, Served, loading, publish, raw, serve, until
from tests.support.versions import under_load


def client_of(served: Served) -> Any:
    return triton.aio.InferenceServerClient(served.target)


async def test_during_the_drain_notice_requests_are_answered_and_health_is_not_serving(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    async with stoppable(tmp_path, loading(Mirror), grace_s=60, drain_notice_s=60.0) as (
        served,
        stop,
        task,
    ):
        await until(served.channel, "", HealthCheckResponse.SERVING)
        stub: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = stub.Watch(HealthCheckRequest(service="tiny"))
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        stop.set()
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        body = await wait_until_not_ready(served.http)
        assert (body["ready"], body["accepting"]) == (False, False)
        async with client_of(served) as client:  # a new connection
            assert not await client.is_server_ready()
        health = await stub.Check(HealthCheckRequest())
        assert health.status == HealthCheckResponse.NOT_SERVING
        async with under_load(served) as results:
            while results.codes.total() < 50:
                await asyncio.sleep(0.001)
        assert results.codes.keys() == {"OK"}
        assert not task.done()
        served.server.hurry.set()
        await task


async def test_sigterm_starts_the_drain_notice_and_a_second_one_ends_it(tmp_path: Path) -> None:
    publish(tmp_path)
    async with server_process("--repo", str(tmp_path), "--drain-notice-s=600") as server:
        listening = await next_event(server, "listening")
        await next_event(server, "version_loaded")
        target = f"127.0.0.1:{listening['port']}"
        async with grpc.aio.insecure_channel(target) as channel:
            served = Served(None, channel)  # type: ignore[arg-type]
            server.send_signal(signal.SIGTERM)
            assert (await next_event(server, "stopping"))["notice_s"] == 600
            await wait_until_not_ready(f"http://127.0.0.1:{listening['http_port']}")
            assert (await served.classify(raw(0))).version == 1
            server.send_signal(signal.SIGTERM)
            await next_event(server, "stopped")
        assert await server.wait() == 0


async def test_a_client_that_switches_servers_during_the_notice_loses_no_request(
    tmp_path: Path,
) -> None:
    """As in a Kubernetes rollout without a preStop hook: load balancers watch readiness."""
    publish(tmp_path)
    async with (
        serve(tmp_path) as other,
        server_process("--repo", str(tmp_path), "--drain-notice-s=0.5", "--grace-s=60") as server,
    ):
        listening = await next_event(server, "listening")
        await next_event(server, "version_loaded")
        ready = f"http://127.0.0.1:{listening['http_port']}/readyz"
        codes: list[StatusCode] = []
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{listening['port']}") as channel,
            httpx.AsyncClient() as http,
        ):
            old = Served(None, channel)  # type: ignore[arg-type]
            elsewhere = asyncio.Event()

            async def calls() -> None:
                while True:
                    gone = elsewhere.is_set()
                    await (other if gone else old).classify(raw(0))
                    codes.append(StatusCode.OK)
                    if gone:
                        return

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(calls())
                while len(codes) < 50:
                    await asyncio.sleep(0.001)
                server.send_signal(signal.SIGTERM)
                while (await http.get(ready)).status_code == 200:
                    pass
                elsewhere.set()
        await next_event(server, "stopped")
        assert await server.wait() == 0
