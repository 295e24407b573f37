"""Unusual loads of honest clients lose no call at the default limits.

Server and clients are processes of their own. Refusals under overload are RESOURCE_EXHAUSTED or
DEADLINE_EXCEEDED; the connection stays.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from PIL import Image

from server.api.stubs import classify_pb2 as pb
from tests.transport.attacks.attack import CLASSIFY, DIGIT, GET_MODEL, HEALTH_CHECK
from tests.transport.attacks.processes import ServerProcess, convserve
from tests.transport.honest.client import CANCELLED, Client, Pace, connected

OK = 0
REFUSALS = {StatusCode.RESOURCE_EXHAUSTED.value[0], StatusCode.DEADLINE_EXCEEDED.value[0]}
LABELS_OF_RESNET = pb.GetModelRequest(model="resnet18").SerializeToString()
TIMEOUT_S = 100.0
DEADLINE_S = 0.04


@pytest.fixture(scope="module")
def server(built_repository: Path) -> Iterator[ServerProcess]:
    with convserve(built_repository, "--models=lenet5,resnet18") as running:
        yield running


def channel_to(server: ServerProcess, **options: int) -> Any:
    """A channel with a connection of its own."""
    chosen = [
        ("grpc.use_local_subchannel_pool", 1),
        *((f"grpc.{n}", v) for n, v in options.items()),
    ]
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=chosen)


async def test_2000_calls_at_once_on_one_channel(server: ServerProcess) -> None:
    async with channel_to(server) as channel:
        classify = channel.unary_unary(CLASSIFY)
        calls = [classify(DIGIT, timeout=TIMEOUT_S) for _ in range(2_000)]
        assert len(await asyncio.gather(*calls)) == 2_000


async def test_500_channels(server: ServerProcess) -> None:
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel_to(server)) for _ in range(500)]
        for _ in range(2):  # the second time on connections that stand
            calls = [one.unary_unary(CLASSIFY)(DIGIT, timeout=TIMEOUT_S) for one in channels]
            assert len(await asyncio.gather(*calls)) == 500


async def test_deadlines_of_40_ms_at_more_than_the_capacity(server: ServerProcess) -> None:
    """A client resets what is not answered in time: under overload, hundreds of calls a second."""
    async with asyncio.timeout(TIMEOUT_S), connected(server.port) as client:
        warm_up = [await client.call(CLASSIFY, DIGIT) for _ in range(20)]
        assert set(warm_up) == {OK}
        rate_hz = 1.5 * await capacity_hz(client)
        ended: Counter[int | None] = Counter()

        async def one_call() -> None:
            stream, status = await client.begin(CLASSIFY, (b"grpc-timeout", b"40m"))
            client.send(stream, DIGIT)
            try:
                ended[await asyncio.wait_for(asyncio.shield(status), DEADLINE_S)] += 1
            except TimeoutError:
                if not status.done():
                    client.cancel(stream)
                ended[None] += 1

        await at_rate(rate_hz, 2.0, one_call)
        assert ended[OK] > 0
        # CANCELLED: the deadline passed while the response was on its way.
        assert set(ended) <= {OK, None, CANCELLED, *REFUSALS}
        assert await client.call(CLASSIFY, DIGIT) == OK


async def capacity_hz(client: Client) -> float:
    """Calls a second with 64 in flight."""
    done, ends_s = 0, time.monotonic() + 1.0

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < ends_s:
            assert await client.call(CLASSIFY, DIGIT) == OK
            done += 1

    await asyncio.gather(*(caller() for _ in range(64)))
    return done / 1.0


async def at_rate(rate_hz: float, seconds: float, make_call: Any) -> None:
    """Starts calls at a constant rate, and waits for all."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as calls:
        started = 0
        while (passed_s := time.monotonic() - began_s) < seconds:
            while started < passed_s * rate_hz:
                calls.create_task(make_call())
                started += 1
            await asyncio.sleep(0.002)


async def test_500_cancelled_calls_a_second_on_one_connection(built_repository: Path) -> None:
    """As Envoy sends them when all its users give up. The calls wait in the server for a batch."""
    slow = ("--models=lenet5", "--scheduler=fixed", "--fixed-batch=256", "--fixed-delay-ms=500")
    with convserve(built_repository, *slow) as server:
        async with asyncio.timeout(TIMEOUT_S), connected(server.port) as client:

            async def cancelled_call() -> None:
                stream, _ = await client.begin(CLASSIFY)
                client.send(stream, DIGIT)
                await asyncio.sleep(0.02)
                client.cancel(stream)

            await at_rate(500, 6.0, cancelled_call)
            assert await client.call(HEALTH_CHECK, b"") == OK
            assert await client.call(CLASSIFY, DIGIT) == OK


async def test_messages_of_20_mb(server: ServerProcess) -> None:
    file = BytesIO()
    Image.new("RGB", (2_600, 2_600)).save(file, "BMP")
    large = pb.ClassifyRequest(model="lenet5", images=[pb.Image(encoded=file.getvalue())])
    data = large.SerializeToString()
    assert len(data) > 20_000_000
    async with channel_to(server, max_send_message_length=-1) as channel:
        calls = [channel.unary_unary(CLASSIFY)(data, timeout=TIMEOUT_S) for _ in range(6)]
        assert len(await asyncio.gather(*calls)) == 6


async def test_7_kb_of_metadata(server: ServerProcess) -> None:
    async with channel_to(server) as channel:
        calls = [
            channel.unary_unary(CLASSIFY)(
                DIGIT, timeout=TIMEOUT_S, metadata=[("x-token", f"{number:04}" * 1_750)]
            )
            for number in range(300)
        ]
        assert len(await asyncio.gather(*calls)) == 300


async def test_pings_of_an_idle_connection(server: ServerProcess) -> None:
    async with asyncio.timeout(TIMEOUT_S), connected(server.port) as client:
        for number in range(40):
            await client.ping(b"%08d" % number)
            await asyncio.sleep(0.05)
        assert await client.call(CLASSIFY, DIGIT) == OK


async def test_4000_answers_of_12_kb_at_once(server: ServerProcess) -> None:
    """They cost about as much as the same number of answers one after the other."""
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(server.port)) for _ in range(16)]
        began_cpu_s = server.cpu_s()
        for client in clients:
            for _ in range(25):
                assert await client.call(GET_MODEL, LABELS_OF_RESNET) == OK
        alone_s = (server.cpu_s() - began_cpu_s) / 400
        began_cpu_s = server.cpu_s()
        calls = [client.call(GET_MODEL, LABELS_OF_RESNET) for client in clients for _ in range(250)]
        assert Counter(await asyncio.gather(*calls)) == {OK: 4_000}
        assert (server.cpu_s() - began_cpu_s) / 4_000 < 2 * alone_s
        assert sum(client.received_bytes for client in clients) / 4_400 > 12_000


@pytest.mark.parametrize("frame_bytes", [1, 16])
async def test_bodies_in_tiny_frames(server: ServerProcess, frame_bytes: int) -> None:
    async with asyncio.timeout(TIMEOUT_S), connected(server.port) as client:
        for _ in range(10):
            assert await client.call(CLASSIFY, DIGIT, pace=Pace(frame_bytes)) == OK


async def test_slow_links(server: ServerProcess) -> None:
    """Fifty phones send a request of 32 KB over three seconds."""
    images = pb.ClassifyRequest(
        model="lenet5",
        pixels=pb.RawImages(count=32, height=32, width=32, channels=1, data=bytes(32 << 10)),
    ).SerializeToString()
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(server.port)) for _ in range(50)]
        pace = Pace(frame_bytes=1_100, pause_s=0.1)
        calls = [client.call(CLASSIFY, images, pace=pace) for client in clients]
        assert Counter(await asyncio.gather(*calls)) == {OK: 50}


async def test_connections_that_wait(server: ServerProcess) -> None:
    """Five hundred connections with a call now and then."""
    async with asyncio.timeout(TIMEOUT_S), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(server.port)) for _ in range(500)]
        for _ in range(2):
            calls = [client.call(CLASSIFY, DIGIT) for client in clients]
            assert Counter(await asyncio.gather(*calls)) == {OK: 500}
            await asyncio.sleep(0.5)
