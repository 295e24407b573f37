"""A channel opens as many connections as its calls need, and none that cannot help."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from convserve_client.loadgen.wire.channel import Channel, call_and_wait
from tests.clients.wire.peers import (
    ECHO,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    TIMEOUT_S,
    answer_frames,
    channel_to,
    connected,
    raw_server,
    setting,
    start_call,
    status_of,
)
from tests.support.http2_peers import DATA, WINDOW_UPDATE, frame, message

MAX_WINDOW = (1 << 31) - 1

ONE_STREAM = setting(MAX_CONCURRENT_STREAMS, 1)


async def test_calls_above_the_servers_limit_go_to_another_connection() -> None:
    async with connected(ONE_STREAM) as (one, channel, connection):
        first, second = start_call(channel, b"first"), start_call(channel, b"second")
        await connection.until(DATA, 1)
        other = await one.accept(ONE_STREAM)
        assert (await other.until(DATA, 1))[1] == message(b"second")
        third = start_call(channel, b"third")
        another = await one.accept(ONE_STREAM)
        assert (await another.until(DATA, 1))[1] == message(b"third")
        for each in (connection, other, another):
            each.send(answer_frames(1))
        assert [status_of(call) for call in await asyncio.gather(first, second, third)] == [
            "OK"
        ] * 3
        for stream in (3, 5):  # one caller needs no further connection
            calling = start_call(channel)
            await another.until(DATA, stream)
            another.send(answer_frames(stream))
            assert status_of(await calling) == "OK"
        assert one.accepted.empty()


async def test_a_channel_keeps_to_its_number_of_connections() -> None:
    async with raw_server() as one:
        channel = Channel(one.target, ECHO, max_connections=1)
        connecting = asyncio.create_task(channel.connect())
        connection = await one.accept(ONE_STREAM)
        await connecting
        calling = [start_call(channel) for _ in range(5)]
        for number in range(5):
            await connection.until(DATA, 2 * number + 1)
            connection.send(answer_frames(2 * number + 1))
        assert [status_of(call) for call in await asyncio.gather(*calling)] == ["OK"] * 5
        assert one.accepted.empty()
        await channel.close()


async def test_a_server_that_allows_no_streams_gets_no_further_connections() -> None:
    async with connected(setting(MAX_CONCURRENT_STREAMS, 0)) as (one, channel, _):
        call = await call_and_wait(channel, b"", 0.05)
        assert status_of(call) == "DEADLINE_EXCEEDED"
        assert one.accepted.empty()


@asynccontextmanager
async def server_that_gathers(callers: int, streams: int) -> AsyncIterator[str]:
    """Target of a server that answers when it has so many calls at once."""
    gathered = asyncio.Barrier(callers)

    async def gather(data: bytes, context: Any) -> bytes:
        await gathered.wait()
        return data

    server = grpc.aio.server(options=[("grpc.max_concurrent_streams", streams)])
    handler = grpc.unary_unary_rpc_method_handler(gather)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test", {"Echo": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_all_callers_are_in_flight_at_once_whatever_the_servers_limit() -> None:
    async with server_that_gathers(250, streams=20) as target, channel_to(target) as channel:
        found = await asyncio.gather(
            *(call_and_wait(channel, b"%d" % number, TIMEOUT_S) for number in range(250))
        )
        assert [call.answer for call in found] == [b"%d" % number for number in range(250)]


async def test_requests_to_a_server_that_does_not_read_stay_in_the_client() -> None:
    wide = setting(INITIAL_WINDOW_SIZE, MAX_WINDOW)
    size, calls = 1 << 20, 40
    async with connected(wide) as (_, channel, connection):
        connection.send(frame(WINDOW_UPDATE, 0, 0, (MAX_WINDOW - 65_535).to_bytes(4, "big")))
        first = start_call(channel, b"first")
        assert (await connection.until(DATA, 1))[1] == message(b"first")
        calling = [start_call(channel, bytes(size), timeout_s=0.2) for _ in range(calls)]
        assert {status_of(call) for call in await asyncio.gather(*calling)} == {"DEADLINE_EXCEEDED"}
        last = start_call(channel, b"last")
        received = 0
        while True:
            kind, _, stream, payload = await connection.frame()
            received += len(payload)
            if kind == DATA and payload == message(b"last"):
                break
        assert received < calls * size / 2
        connection.send(answer_frames(1), answer_frames(stream))
        assert [status_of(call) for call in await asyncio.gather(first, last)] == ["OK", "OK"]
