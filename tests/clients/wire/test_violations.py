"""Violations of the protocol end the stream or the connection, and never leave a call open."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from tests.clients.wire.peers import (
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    OK_TRAILERS,
    RESPONSE_HEADERS,
    TIMEOUT_S,
    answer_frames,
    connected,
    plain_block,
    setting,
    start_call,
    status_of,
)
from tests.support.http2_peers import (
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ended_with,
    frame,
    message,
)

VIOLATIONS = {
    "a frame that is too long": (frame(77, 0, 0, bytes(16_385)), FRAME_SIZE_ERROR),
    "settings on a stream": (frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
    "an incomplete setting": (frame(SETTINGS, 0, 0, b"123"), FRAME_SIZE_ERROR),
    "a window that is too large": (
        frame(SETTINGS, 0, 0, setting(INITIAL_WINDOW_SIZE, 1 << 31)),
        FLOW_CONTROL_ERROR,
    ),
    "a frame size that is too small": (
        frame(SETTINGS, 0, 0, setting(MAX_FRAME_SIZE, 100)),
        PROTOCOL_ERROR,
    ),
    "a short ping": (frame(PING, 0, 0, b"1"), FRAME_SIZE_ERROR),
    "a ping on a stream": (frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "a push": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), PROTOCOL_ERROR),
    "data on a stream that was never opened": (frame(DATA, 0, 9, b""), PROTOCOL_ERROR),
    "headers on a stream that the server opened": (
        frame(HEADERS, END_HEADERS, 2, plain_block(RESPONSE_HEADERS)),
        PROTOCOL_ERROR,
    ),
    "more padding than payload": (frame(DATA, PADDED, 1, b"\5abc"), PROTOCOL_ERROR),
    "headers that cannot be decoded": (
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
        COMPRESSION_ERROR,
    ),
    "headers without their continuation": (
        frame(HEADERS, 0, 1, b"") + frame(DATA, 0, 1, b""),
        PROTOCOL_ERROR,
    ),
    "a continuation without headers": (frame(CONTINUATION, END_HEADERS, 1), PROTOCOL_ERROR),
    "a window update of 0": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "a window update beyond the limit": (
        frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        FLOW_CONTROL_ERROR,
    ),
    "a short GOAWAY": (frame(GOAWAY, 0, 0, b""), FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("fault", VIOLATIONS)
async def test_a_protocol_violation_ends_the_connection_with_its_reason(fault: str) -> None:
    sent, code = VIOLATIONS[fault]
    async with connected() as (_, channel, connection):
        calling = start_call(channel)
        await connection.until(DATA, 1)
        connection.send(sent)
        assert await ended_with(connection) == code
        call = await calling
        assert status_of(call) == "UNAVAILABLE"
        assert "violated HTTP/2" in call.message


UNLIMITED_HEADERS = {
    "endless continuations": frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 20,
    "more bytes than allowed": frame(HEADERS, 0, 1)
    + frame(CONTINUATION, 0, 1, plain_block([("name", "v" * 100)]) * 150) * 5,
    "more fields than allowed": frame(HEADERS, END_HEADERS, 1, b"\x88" + b"\x90" * 2000),
}


@pytest.mark.parametrize("kind", UNLIMITED_HEADERS)
async def test_headers_without_limit_end_the_connection(kind: str) -> None:
    async with connected() as (_, channel, connection):
        calling = start_call(channel)
        await connection.until(DATA, 1)
        connection.send(UNLIMITED_HEADERS[kind])
        call = await calling
        assert status_of(call) == "UNAVAILABLE"
        assert "violated HTTP/2" in call.message
        with suppress(ConnectionResetError):
            while await connection.reader.read(1 << 16):
                pass  # the client closes the connection


async def test_a_violation_on_one_stream_ends_only_that_stream() -> None:
    upper = plain_block([(":status", "200"), ("Content-Type", "application/grpc")])
    late = plain_block([("content-type", "application/grpc"), (":status", "200")])
    async with connected() as (_, channel, connection):
        calling = [start_call(channel) for _ in range(4)]
        await connection.until(DATA, 7)
        connection.send(frame(HEADERS, END_HEADERS, 1, upper))
        connection.send(frame(HEADERS, END_HEADERS, 3, late))
        connection.send(frame(HEADERS, END_HEADERS, 5, plain_block(RESPONSE_HEADERS)) * 2)
        connection.send(answer_frames(7))
        found = await asyncio.gather(*calling)
    assert [status_of(call) for call in found] == ["INTERNAL"] * 3 + ["OK"]


async def test_random_bytes_never_leave_a_call_open() -> None:
    rng = random.Random(5)
    kinds = (DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 77)
    usual = (0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM)

    def noise() -> bytes:
        flags = rng.choice((*usual, rng.randrange(256)))
        payload = rng.choice(
            (
                plain_block(RESPONSE_HEADERS),
                plain_block(OK_TRAILERS),
                message(b"x"),
                rng.randbytes(5),
            )
        )
        return frame(rng.choice(kinds), flags, rng.choice((0, 1, 1, 3)), payload)

    for _ in range(150):
        async with connected() as (_, channel, connection):
            calling = [start_call(channel, timeout_s=0.02) for _ in range(2)]
            connection.send(*(noise() for _ in range(6)))
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*calling)
