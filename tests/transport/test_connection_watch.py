"""Connections and calls that take too long are ended: silent, idle, old, stalled, incomplete."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from server.telemetry.clock import clock
from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.http2.preface import PREFACE
from tests.support.http2_peers import (
    ACK,
    BODY,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    HELLO,
    PING,
    REQUEST,
    SETTINGS,
    WINDOW_UPDATE,
    Bare,
    Raw,
    bare,
    frame,
    headers,
    message,
    raw,
)

NO_WINDOW = frame(SETTINGS, 0, 0, b"\0\x04" + bytes(4))


def limits(**changed: Any) -> TransportLimits:
    return TransportLimits(message_bytes=1 << 20, receiving_bytes=8 << 20, streams=100, **changed)


def after(one: Bare, seconds: float) -> None:
    """Lets the server check its connections as if so much time had passed."""
    one.server._watch.check(clock() + seconds)


async def cut_with(connection: Raw) -> bytes:
    _, payload = await connection.until(GOAWAY)
    assert int.from_bytes(payload[4:8], "big") == ENHANCE_YOUR_CALM
    assert await connection.reader.read() == b""
    return payload[8:]


async def test_a_request_without_a_body_ends_after_20_s() -> None:
    async with bare() as one, raw(one, HELLO, REQUEST) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 3, headers(path="/test/Each")))
        await connection.alive()
        after(one, 19)
        await connection.alive()
        after(one, 21)
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x014" in payload
        assert b"did not begin within 20 s" in payload
        connection.send(frame(DATA, END_STREAM, 3, message(b"x")))  # a stream may wait for long
        assert (await connection.until(DATA, 3))[1] == message(b"x")


@pytest.mark.parametrize("path", ["/test/Echo", "/test/Each"])
async def test_a_message_has_a_minute_and_more_at_a_fair_pace(path: str) -> None:
    request = headers(path=path)
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, request))
        body = message(bytes(900_000))
        for at in range(0, 640_000, 160_000):
            connection.send(frame(DATA, 0, 1, body[at : at + 160_000]))
        connection.send(frame(HEADERS, END_HEADERS, 3, request))
        connection.send(frame(DATA, 0, 3, message(bytes(1000))[:3]))
        await connection.alive()
        after(one, 59)
        await connection.alive()
        after(one, 70)
        _, payload = await connection.until(HEADERS, 3)
        assert b"grpc-status\x014" in payload
        after(one, 90)
        _, payload = await connection.until(HEADERS, 1)
        assert b"did not arrive within 80 s" in payload
        await connection.echoes(5)


async def test_a_connection_that_does_not_begin_is_cut() -> None:
    async with bare() as one, raw(one, PREFACE[:3]) as silent, raw(one, HELLO) as other:
        await other.alive()
        after(one, 0)
        after(one, 21)
        assert await silent.reader.read() == b""
        assert one.cuts == {"no_preface": 1}
        await other.echoes(1)


async def test_a_silent_client_is_pinged_and_then_cut() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        await connection.alive()
        after(one, 0)
        after(one, 61)
        while (found := await connection.frame())[0] != PING:
            pass
        assert found[3] == b"keepaliv"
        after(one, 81)
        assert await cut_with(connection) == b"no_answer"


async def test_an_idle_connection_gets_goaway_and_one_with_a_call_does_not() -> None:
    async with (
        bare(limits(connection_idle_s=100)) as one,
        raw(one, HELLO) as idle,
        raw(one, HELLO) as busy,
    ):
        await idle.echoes(1)
        busy.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Each")))
        await busy.alive()
        after(one, 0)
        after(one, 50)
        idle.send(frame(PING, 0, 0, bytes(8)))  # pings are no calls
        await idle.until(PING)
        await busy.alive()
        after(one, 101)
        _, payload = await idle.until(GOAWAY)
        assert payload[4:8] == bytes(4)
        await idle.echoes(3)  # sent before the GOAWAY arrived
        idle.send(frame(PING, ACK, 0, b"retiring"))
        assert (await idle.until(GOAWAY))[1] == b"\0\0\0\3" + bytes(4)
        assert await idle.reader.read() == b""
        busy.send(frame(DATA, END_STREAM, 1, message(b"x")))
        assert (await busy.until(DATA, 1))[1] == message(b"x")
        assert not one.cuts


async def test_an_old_connection_finishes_its_calls_within_the_grace_period() -> None:
    aged = limits(connection_age_s=1000, connection_age_grace_s=100)
    async with bare(aged) as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never")), BODY)
        await one.started.wait()
        after(one, 890)
        await connection.alive()
        after(one, 1110)
        await connection.until(GOAWAY)
        await connection.echoes(3)
        connection.send(frame(PING, ACK, 0, b"retiring"))
        await connection.until(GOAWAY)
        after(one, 1310)
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x0214" in payload
        assert b"maximum age" in payload
        assert await connection.reader.read() == b""


async def test_a_retired_connection_that_stays_is_closed() -> None:
    async with bare(limits(connection_idle_s=100)) as one, raw(one, HELLO) as connection:
        await connection.alive()
        after(one, 0)
        after(one, 101)
        await connection.until(GOAWAY)  # and does not acknowledge the ping
        after(one, 140)
        assert await connection.reader.read() == b""


async def test_a_client_that_reads_nothing_for_a_minute_is_cut() -> None:
    async with bare() as one, raw(one, HELLO, NO_WINDOW) as connection:
        connection.send(REQUEST, BODY)
        await connection.until(HEADERS, 1)
        await connection.alive()
        after(one, 0)
        after(one, 59)
        connection.send(frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"))
        assert (await connection.until(DATA, 1))[1] == b"\0"
        after(one, 80)  # it has read something
        after(one, 130)
        await connection.alive()
        after(one, 145)
        assert await cut_with(connection) == b"stalled"


async def test_the_client_with_the_most_unread_bytes_is_cut() -> None:
    large = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Large"))
    async with (
        bare(limits(unsent_bytes=1_000_000)) as one,
        raw(one, HELLO, NO_WINDOW) as first,
        raw(one, HELLO, NO_WINDOW) as second,
    ):
        first.send(large, frame(DATA, END_STREAM, 1, message(b"600000")))
        await first.until(HEADERS, 1)
        await first.alive()
        second.send(large, frame(DATA, END_STREAM, 1, message(b"450000")))
        assert await cut_with(first) == b"unsent_bytes"
        await second.alive()
        assert one.cuts == {"unsent_bytes": 1}


@pytest.mark.parametrize(
    ("most", "per_peer", "reason"),
    [(1, 100, b"max_connections"), (100, 1, b"max_connections_per_peer")],
)
async def test_a_connection_above_the_limits_is_closed_with_a_reason(
    most: int, per_peer: int, reason: bytes
) -> None:
    async with bare(max_connections=most, max_per_peer=per_peer) as one:
        async with raw(one, HELLO) as first:
            await first.alive()
            async with raw(one) as second:
                _, payload = await second.until(GOAWAY)
                assert payload[4:] == ENHANCE_YOUR_CALM.to_bytes(4, "big") + reason
                assert await second.reader.read() == b""
            await first.echoes(1)
            first.writer.write_eof()
            await first.reader.read()
        async with raw(one, HELLO) as third:
            await third.echoes(1)


async def test_open_calls_are_bounded_over_all_connections_and_few_calls_are_let_in() -> None:
    bounded = limits(calls=40)
    async with bare(bounded) as one, raw(one, HELLO) as hog, raw(one, HELLO) as other:
        for stream in range(1, 101, 2):  # their requests never arrive
            hog.send(frame(HEADERS, END_HEADERS, stream, headers()))
        _, payload = await hog.until(HEADERS, 81)
        assert b"grpc-status\x018" in payload
        assert b"too many calls are open" in payload
        await other.echoes(1)


async def test_no_call_is_lost_when_connections_reach_their_maximum_age() -> None:
    aged = limits(connection_age_s=10)
    async with bare(aged) as one, grpc.aio.insecure_channel(f"127.0.0.1:{one.port}") as channel:
        echo: Any = channel.unary_unary("/test/Echo")  # type: ignore[call-arg]
        answered = 0
        seen: set[int] = set()

        async def call_often() -> None:
            nonlocal answered
            for _ in range(100):
                assert await echo(b"x", timeout=20) == b"x"
                answered += 1
                seen.update(map(id, one.server._connections))
                if answered % 100 == 0:
                    after(one, 12)  # all connections are too old

        await asyncio.gather(*(call_often() for _ in range(16)))
    assert answered == 1600
    assert len(seen) > 3  # the channel has connected again and again
