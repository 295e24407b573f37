"""Envoy as the balancer in front of convserve: calls, and floods of honest cancellations."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from tests.outside.conftest import Digit, Service
from tests.outside.test_grpcio import CALLS, class_of, request
from tests.outside.tools import needs
from tests.transport.attacks.attack import CLASSIFY, GET_MODEL
from tests.transport.attacks.processes import convserve

pytestmark = needs("envoy")

TEMPLATE = Path(__file__).with_name("envoy.yaml")
START_S = 20.0
GET_LENET = pb.GetModelRequest(model="lenet5").SerializeToString()


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now. Envoy reports no port that it chose itself."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


class Envoy:
    """A running Envoy, and what it counts."""

    def __init__(self, port: int, admin_port: int) -> None:
        self.target = f"127.0.0.1:{port}"
        self._admin = f"http://127.0.0.1:{admin_port}"

    async def count(self, name: str) -> int:
        async with httpx.AsyncClient() as client:
            filtered = f"{self._admin}/stats?filter=^cluster.convserve.{name}$"
            text = (await client.get(filtered)).text
        return int(text.rpartition(":")[2])


@asynccontextmanager
async def envoy(server_port: int, timeout: str, folder: Path) -> AsyncIterator[Envoy]:
    port, admin_port = free_ports(2)
    text = TEMPLATE.read_text()
    for name, value in (
        ("LISTEN_PORT", port),
        ("SERVER_PORT", server_port),
        ("ADMIN_PORT", admin_port),
        ("TIMEOUT", timeout),
    ):
        text = text.replace(name, str(value))
    config = folder / "envoy.yaml"
    config.write_text(text)
    command = ["envoy", "-c", str(config), "--concurrency", "1", "--log-level", "error"]
    process = subprocess.Popen([*command, "--use-dynamic-base-id"], env=os.environ)
    one = Envoy(port, admin_port)
    try:
        async with asyncio.timeout(START_S):
            while True:
                assert process.poll() is None
                try:
                    if await one.count("membership_healthy"):
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        yield one
    finally:
        process.terminate()
        process.wait(START_S)


async def at_rate(
    rate_hz: float, seconds: float, make_call: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as calls:
        for number in range(int(rate_hz * seconds)):
            await asyncio.sleep(max(0.0, began_s + number / rate_hz - time.monotonic()))
            calls.create_task(make_call())


async def test_calls_through_envoy(plain: Service, digit: Digit, tmp_path: Path) -> None:
    async with (
        envoy(plain.server.port, "0s", tmp_path) as one,
        grpc.aio.insecure_channel(one.target) as channel,
    ):
        classify: Any = channel.unary_unary(CLASSIFY, None, None)
        answers = await asyncio.gather(
            *(classify(request(digit), timeout=60) for _ in range(CALLS))
        )
        assert {class_of(answer) for answer in answers} == {digit.label}


async def test_500_calls_a_second_that_envoy_gives_up(
    built_repository: Path, digit: Digit, tmp_path: Path
) -> None:
    """Its one connection to the server stays, and other calls on it are answered."""
    slow = ("--models=lenet5", "--scheduler=fixed", "--fixed-batch=256", "--fixed-delay-ms=1000")
    with convserve(built_repository, *slow) as server:
        async with (
            envoy(server.port, "0.05s", tmp_path) as one,
            grpc.aio.insecure_channel(one.target) as channel,
        ):
            codes: set[StatusCode] = set()

            async def given_up() -> None:
                call: Any = channel.unary_unary(CLASSIFY, None, None)(request(digit), timeout=60)
                codes.add(await call.code())

            get_model: Any = channel.unary_unary(GET_MODEL, None, None)
            await at_rate(500, 6.0, given_up)
            assert await get_model(GET_LENET, timeout=60)
            assert codes <= {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
            assert await one.count("upstream_rq_timeout") > 2_900
            assert await one.count("upstream_cx_total") <= 2  # one of them for health checks
            assert await one.count("upstream_cx_destroy_remote_with_active_rq") == 0
            assert await one.count("membership_healthy") == 1
