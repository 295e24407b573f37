"""Calls follow HTTP/2 and gRPC: the server uses h2, which raises on every violation."""

from __future__ import annotations

import asyncio
import random

import pytest
from h2.settings import SettingCodes

from convserve_client.loadgen.wire.channel import call_and_wait
from tests.clients.wire.peers import (
    ECHO,
    TIMEOUT_S,
    channel_to,
    start_call,
    status_of,
    strict_server,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"INITIAL_WINDOW_SIZE": 1000},
        {"INITIAL_WINDOW_SIZE": 1 << 20, "MAX_FRAME_SIZE": 1 << 20},
        {"INITIAL_WINDOW_SIZE": 2**31 - 1},
        {"MAX_CONCURRENT_STREAMS": 2},
        {"MAX_CONCURRENT_STREAMS": 1, "INITIAL_WINDOW_SIZE": 17, "HEADER_TABLE_SIZE": 0},
        {"HEADER_TABLE_SIZE": 0},
        {"HEADER_TABLE_SIZE": 100},
        {"HEADER_TABLE_SIZE": 65_536},
    ],
    ids=str,
)
async def test_limits_of_windows_frames_streams_and_tables_are_respected(
    options: dict[str, int],
) -> None:
    sizes = [0, 100, 30_000, 100_000, 5, 3000]
    messages = [random.Random(size).randbytes(size) for size in sizes]
    async with (
        strict_server(**options) as (target, server),
        channel_to(target, max_connections=1) as channel,
    ):
        for _ in range(2):
            found = await asyncio.gather(
                *(call_and_wait(channel, data, TIMEOUT_S) for data in messages)
            )
            assert [status_of(call) for call in found] == ["OK"] * len(sizes)
            assert [call.answer for call in found] == messages
        assert server.max_open == min(len(sizes), options.get("MAX_CONCURRENT_STREAMS", len(sizes)))


async def test_a_request_has_all_headers_that_grpc_requires() -> None:
    async with strict_server() as (target, server), channel_to(target) as channel:
        await call_and_wait(channel, b"", 2.5)
    assert server.headers == [
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", ECHO),
            (":authority", target),
            ("te", "trailers"),
            ("grpc-timeout", "2500000u"),
            ("content-type", "application/grpc"),
            ("user-agent", "convserve-bench"),
        ]
    ]


async def test_a_window_may_become_negative_and_grow_again() -> None:
    data = bytes(200_000)
    async with (
        strict_server(INITIAL_WINDOW_SIZE=50_000) as (target, server),
        channel_to(target) as channel,
    ):
        calling = start_call(channel, data)
        while not server.bodies:
            await asyncio.sleep(0)
        server.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        server.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 300_000})
        server.transport.write(server.h2.data_to_send())
        assert (await calling).answer == data
