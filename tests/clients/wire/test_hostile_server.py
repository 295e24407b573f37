"""A server that floods its client neither hangs the load generator nor fills its memory."""

from __future__ import annotations

import asyncio
import resource
import time

import pytest

from tests.clients.wire.peers import (
    RESPONSE_HEADERS,
    TIMEOUT_S,
    connected,
    plain_block,
    setting,
    start_call,
    status_of,
)
from tests.support.http2_peers import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    PRIORITY,
    SETTINGS,
    WINDOW_UPDATE,
    Raw,
    frame,
)

INFORMATIONAL = frame(HEADERS, END_HEADERS, 1, plain_block([(":status", "103"), ("a", "b" * 90)]))
RESPONSE = frame(HEADERS, END_HEADERS, 1, plain_block(RESPONSE_HEADERS))
FLOODS = {
    "informational responses": (b"", INFORMATIONAL),
    "data without end": (RESPONSE, frame(DATA, 0, 1, bytes(16_384))),
    "empty data": (RESPONSE, frame(DATA, 0, 1)),
    "data of one byte": (RESPONSE, frame(DATA, 0, 1, b"\0")),
    "settings": (b"", frame(SETTINGS, 0, 0, setting(4, 70_000))),
    "pings": (b"", frame(PING, 0, 0, bytes(8))),
    "priorities": (b"", frame(PRIORITY, 0, 1, bytes(4) + b"\1")),
    "window updates": (b"", frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1")),
    "unknown frames": (b"", frame(77, 0, 0, b"12")),
    "continuations": (frame(HEADERS, 0, 1), frame(CONTINUATION, 0, 1)),
}
CHUNK_BYTES = 256 << 10
LIMIT_BYTES = 200 << 20  # of memory, beside what is in use; an answer may have 64 MiB


async def flood(connection: Raw, first: bytes, repeated: bytes) -> None:
    chunk = repeated * (CHUNK_BYTES // len(repeated))
    connection.send(first)
    try:
        while True:
            connection.send(chunk)
            await connection.writer.drain()
    except ConnectionError:
        pass  # the client has enough


@pytest.mark.parametrize("kind", FLOODS)
async def test_calls_to_a_server_that_floods_end_by_their_deadline(kind: str) -> None:
    first, repeated = FLOODS[kind]
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    async with connected() as (_, channel, connection):
        began_s = time.monotonic()
        calling = start_call(channel, timeout_s=0.3)
        await connection.until(DATA, 1)
        flooding = asyncio.create_task(flood(connection, first, repeated))
        call = await calling
        assert time.monotonic() - began_s < TIMEOUT_S / 2
        assert status_of(call) in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED")
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        connection.writer.transport.abort()
    after_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert after_bytes - before_bytes < LIMIT_BYTES
