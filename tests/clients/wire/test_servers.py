"""Calls work with any gRPC server: convserve's own transport and grpcio's."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, cast

import grpc
import pytest

from convserve_client.loadgen.wire import call as call_module
from convserve_client.loadgen.wire import connection
from convserve_client.loadgen.wire.channel import call_and_wait
from tests.clients.wire.peers import (
    TIMEOUT_S,
    channel_to,
    convserve_server,
    grpcio_server,
    status_of,
)
from tests.support.http2_peers import (
    bare,
)

SERVERS = {"ours": convserve_server, "grpcio": grpcio_server}


every_server = pytest.mark.parametrize("server", SERVERS)


@every_server
async def test_messages_of_all_sizes_are_echoed(server: str) -> None:
    sizes = [0, 1, 4, 16_379, 16_380, 65_531, 70_000, 1 << 20, 3_000_000]
    messages = [random.Random(size).randbytes(size) for size in sizes]
    async with SERVERS[server]() as target, channel_to(target) as channel:
        for _ in range(3):
            found = await asyncio.gather(
                *(call_and_wait(channel, data, TIMEOUT_S) for data in messages[:-1])
            )
            found.append(await call_and_wait(channel, messages[-1], TIMEOUT_S))
            assert [status_of(call) for call in found] == ["OK"] * len(sizes)
            assert [call.answer for call in found] == messages


@every_server
async def test_concurrent_calls_each_get_their_own_answer(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target) as channel:
        for _ in range(2):  # ours allows a hundred streams
            found = await asyncio.gather(
                *(call_and_wait(channel, str(number).encode(), TIMEOUT_S) for number in range(500))
            )
            assert [call.answer for call in found] == [b"%d" % number for number in range(500)]


@every_server
async def test_a_refusal_has_its_message_and_trailers(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Refuse") as channel:
        call = await call_and_wait(channel, b"", TIMEOUT_S)
    failure = call.failure()
    assert (failure.code(), failure.details()) == (
        grpc.StatusCode.ABORTED,
        "100 % naïve\n\N{SNOWMAN}",
    )
    found = dict(list(cast(Any, failure.trailing_metadata())))
    assert (found["why-bin"], found["hint"]) == (b"\0\xff\x01", "1")


@every_server
async def test_a_deadline_ends_only_its_own_call(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Never") as channel:
        began_s = time.monotonic()
        found = await asyncio.gather(
            *(call_and_wait(channel, b"", n / 100) for n in (20, 5, 10, 5))
        )
        assert [status_of(call) for call in found] == ["DEADLINE_EXCEEDED"] * 4
        assert time.monotonic() - began_s >= 0.2


@every_server
async def test_an_unknown_method_is_unimplemented(server: str) -> None:
    async with SERVERS[server]() as target, channel_to(target, "/test/Nothing") as channel:
        assert status_of(await call_and_wait(channel, b"", TIMEOUT_S)) == "UNIMPLEMENTED"


async def test_calls_after_the_server_has_stopped_are_unavailable() -> None:
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}") as channel:
        assert status_of(await call_and_wait(channel, b"", TIMEOUT_S)) == "OK"
        stopping = asyncio.create_task(one.server.stop(TIMEOUT_S))
        await stopping
        assert status_of(await call_and_wait(channel, b"", TIMEOUT_S)) == "UNAVAILABLE"


async def test_flow_control_windows_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer, and many answers, more than the first windows hold."""
    monkeypatch.setattr(connection, "STREAM_WINDOW", 100_000)
    monkeypatch.setattr(connection, "CONNECTION_WINDOW", 150_000)
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}", "/test/Large") as channel:
        sizes = [b"1000000", b"400000", b"30000"] * 3
        found = await asyncio.gather(*(call_and_wait(channel, size, TIMEOUT_S) for size in sizes))
        assert [len(call.answer) for call in found] == [int(size) for size in sizes]


async def test_an_answer_above_the_limit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "MAX_BODY_BYTES", 50_000)
    async with bare() as one, channel_to(f"127.0.0.1:{one.port}", "/test/Large") as channel:
        assert status_of(await call_and_wait(channel, b"100000", TIMEOUT_S)) == "RESOURCE_EXHAUSTED"
        assert status_of(await call_and_wait(channel, b"1000", TIMEOUT_S)) == "OK"
