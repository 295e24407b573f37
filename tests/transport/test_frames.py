"""HTTP/2 frames written by hand: protocol errors, limits, requests cut into pieces."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from grpc import StatusCode
from hpack import Encoder

from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.http2.connection import STREAM_WINDOW
from server.transport.http2.preface import PREFACE
from tests.support.http2_peers import (
    ACK,
    BODY,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    ECHO,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    HELLO,
    PADDED,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    REQUEST,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WAIT_S,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    bare,
    ended_with,
    frame,
    headers,
    message,
    raw,
)

FAULTS = {
    "no settings first": (PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR),
    "settings of a stream": (HELLO + frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
    "half a setting": (HELLO + frame(SETTINGS, 0, 0, b"123"), FRAME_SIZE_ERROR),
    "settings answered with something": (
        HELLO + frame(SETTINGS, ACK, 0, bytes(6)),
        FRAME_SIZE_ERROR,
    ),
    "a window too wide": (
        HELLO + frame(SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
        FLOW_CONTROL_ERROR,
    ),
    "frames too small": (
        HELLO + frame(SETTINGS, 0, 0, b"\0\x05\0\0\x10\0"),
        PROTOCOL_ERROR,
    ),
    "push 2": (HELLO + frame(SETTINGS, 0, 0, b"\0\x02\0\0\0\x02"), PROTOCOL_ERROR),
    "a push": (HELLO + frame(PUSH_PROMISE, 0, 1, bytes(4)), PROTOCOL_ERROR),
    "a frame too large": (HELLO + b"\xff\xff\xff\0\0\0\0\0\1", FRAME_SIZE_ERROR),
    "a ping too short": (HELLO + frame(PING, 0, 0, b"1"), FRAME_SIZE_ERROR),
    "a ping of a stream": (HELLO + frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "data of the connection": (HELLO + frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
    "data of no stream": (HELLO + frame(DATA, 0, 5, b"x"), PROTOCOL_ERROR),
    "a reset of no stream": (HELLO + frame(RST_STREAM, 0, 5, bytes(4)), PROTOCOL_ERROR),
    "a reset too short": (HELLO + REQUEST + frame(RST_STREAM, 0, 1, b"1"), FRAME_SIZE_ERROR),
    "a window of no stream": (
        HELLO + frame(WINDOW_UPDATE, 0, 5, b"\0\0\0\1"),
        PROTOCOL_ERROR,
    ),
    "a window by nothing": (HELLO + frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "a window beyond all bounds": (
        HELLO + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        FLOW_CONTROL_ERROR,
    ),
    "a window too short": (HELLO + frame(WINDOW_UPDATE, 0, 0, b"1"), FRAME_SIZE_ERROR),
    "a stream of the server's": (
        HELLO + frame(HEADERS, END_HEADERS, 2, headers()),
        PROTOCOL_ERROR,
    ),
    "headers of the connection": (
        HELLO + frame(HEADERS, END_HEADERS, 0, headers()),
        PROTOCOL_ERROR,
    ),
    "headers that make no sense": (
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        COMPRESSION_ERROR,
    ),
    "headers cut off": (
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\x40\x0aab"),
        COMPRESSION_ERROR,
    ),
    "padding beyond the end": (
        HELLO + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09abc"),
        PROTOCOL_ERROR,
    ),
    "padding of nothing": (HELLO + REQUEST + frame(DATA, PADDED, 1), PROTOCOL_ERROR),
    "half a priority": (
        HELLO + frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"abc"),
        FRAME_SIZE_ERROR,
    ),
    "a priority of the wrong size": (HELLO + frame(PRIORITY, 0, 1, b"abc"), FRAME_SIZE_ERROR),
    "an end of a stream": (HELLO + frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "half an end": (HELLO + frame(GOAWAY, 0, 0, bytes(4)), FRAME_SIZE_ERROR),
    "headers that go on from nothing": (
        HELLO + frame(CONTINUATION, END_HEADERS, 1, headers()),
        PROTOCOL_ERROR,
    ),
    "headers interrupted": (
        HELLO + frame(HEADERS, 0, 1, headers()) + frame(PING, 0, 0, bytes(8)),
        PROTOCOL_ERROR,
    ),
    "headers that go on elsewhere": (
        HELLO + frame(HEADERS, 0, 1, headers()) + frame(CONTINUATION, END_HEADERS, 3),
        PROTOCOL_ERROR,
    ),
    "headers without end": (
        HELLO + frame(HEADERS, 0, 1) + 9 * frame(CONTINUATION, 0, 1, bytes(8192)),
        ENHANCE_YOUR_CALM,
    ),
    "headers that go on with nothing": (
        HELLO + frame(HEADERS, 0, 1) + 9 * frame(CONTINUATION, 0, 1),
        ENHANCE_YOUR_CALM,
    ),
    "headers of one huge frame": (
        HELLO + frame(HEADERS, END_HEADERS, 1, bytes(200_000)),
        COMPRESSION_ERROR,
    ),
    "headers that inflate": (
        HELLO
        + frame(HEADERS, END_HEADERS, 1, b"\x40\x01a\x7f\xa1\x17" + b"x" * 3104 + b"\xbe" * 60),
        ENHANCE_YOUR_CALM,
    ),
    "a stream's window by nothing": (
        HELLO + REQUEST + frame(WINDOW_UPDATE, 0, 1, bytes(4)),
        PROTOCOL_ERROR,
    ),
    "a stream's window beyond all bounds": (
        HELLO + REQUEST + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"),
        FLOW_CONTROL_ERROR,
    ),
    "data after the end": (
        HELLO
        + frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never"))
        + frame(DATA, END_STREAM, 1, message(b""))
        + frame(DATA, 0, 1, b"more"),
        STREAM_CLOSED,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_protocol_error_closes_its_own_connection_only(fault: str) -> None:
    sent, code = FAULTS[fault]
    async with bare() as one, raw(one, HELLO) as other, raw(one, sent) as connection:
        assert await ended_with(connection) == code
        await other.echoes(1)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(HEADERS, END_HEADERS, 1, headers(Upper="x")), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers(connection="x")), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers(te="gzip")), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers([(":path", "/")])), PROTOCOL_ERROR),
        (REQUEST + frame(HEADERS, END_HEADERS, 1, headers()), PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, b"\x20" * 20_000), PROTOCOL_ERROR),
    ],
)
async def test_a_stream_error_ends_its_own_stream_only(sent: bytes, code: int) -> None:
    async with bare() as one, raw(one, HELLO, sent) as connection:
        _, payload = await connection.until(RST_STREAM, 1)
        assert int.from_bytes(payload, "big") == code
        await connection.echoes(3)


async def test_data_beyond_the_window_ends_the_connection() -> None:
    async with bare() as one, raw(one, HELLO) as other, raw(one, HELLO) as connection:
        await connection.alive()
        # Deaf reads one message and leaves all others: nothing more is granted then.
        connection.send(frame(HEADERS, END_HEADERS, 3, headers(path="/test/Deaf")))
        size = 200_000
        for _ in range(STREAM_WINDOW // size + 3):
            connection.send(frame(DATA, 0, 3, message(bytes(size - 5))))
        _, payload = await connection.until(GOAWAY)
        assert int.from_bytes(payload[4:8], "big") == FLOW_CONTROL_ERROR
        await other.echoes(1)


@pytest.mark.parametrize("speaks", [b"GET / HTTP/1.1\r\n\r\n", b"POST", b"PRI * HTTP/1.0\r\n"])
async def test_an_http1_client_is_pointed_to_the_http_port(speaks: bytes) -> None:
    async with bare() as one, raw(one, speaks) as connection:
        answer = await connection.reader.read()
        assert answer.startswith(b"HTTP/1.1 505 ")
        assert b"the HTTP port" in answer


async def test_a_tls_handshake_closes_the_connection() -> None:
    async with bare() as one, raw(one, b"\x16\x03\x01\x02\0\x01") as connection:
        while (await connection.reader.read(1024)) != b"":
            pass
        async with raw(one, HELLO) as other:
            await other.echoes(1)


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"method": "GET"}, b"405"),
        ({"content_type": "application/json"}, b"415"),
        ({"content_type": "application/grpc-web"}, b"415"),
        ({"content_type": ""}, b"415"),
    ],
)
async def test_a_request_that_is_not_grpc_gets_an_http_status(
    changed: dict[str, Any], status: bytes
) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, headers(**changed)))
        flags, payload = await connection.until(HEADERS, 1)
        assert flags & END_STREAM
        assert status in payload
        await connection.echoes(3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
async def test_bytes_may_arrive_in_pieces_of_any_size(size: int) -> None:
    data = random.Random(size).randbytes(3000)
    whole = HELLO + REQUEST + frame(DATA, 0, 1, message(data)[:1234])
    whole += frame(PING, 0, 0, b"between!") + frame(DATA, 0, 1) + frame(77, 3, 1, b"unknown")
    whole += frame(PRIORITY, 0, 1, bytes(5))
    whole += frame(DATA, PADDED, 1, b"\x05" + message(data)[1234:2000] + bytes(5))
    whole += frame(DATA, 0, 1, message(data)[2000:])
    whole += frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\x01a\x01b")  # trailers
    async with bare() as one, raw(one) as connection:
        for at in range(0, len(whole), size):
            connection.send(whole[at : at + size])
            await connection.writer.drain()
            await asyncio.sleep(0)
        assert (await connection.until(DATA, 1))[1] == message(data)


async def test_headers_may_arrive_in_pieces_with_padding_and_priority() -> None:
    pieces = [headers()[:20], headers()[20:50], headers()[50:]]
    first = b"\x03" + bytes(5) + pieces[0] + bytes(3)
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(
            frame(HEADERS, PADDED | WITH_PRIORITY, 1, first),
            frame(CONTINUATION, 0, 1, pieces[1]),
            frame(CONTINUATION, END_HEADERS, 1, pieces[2]),
            BODY,
        )
        assert (await connection.until(DATA, 1))[1] == message(b"word")


async def test_windows_and_resets_of_ended_streams_are_ignored() -> None:
    async with bare() as one, raw(one, HELLO, REQUEST, BODY) as connection:
        await connection.until(DATA, 1)
        connection.send(
            frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
            frame(RST_STREAM, 0, 1, bytes(4)),
        )
        await connection.echoes(3)


LATE = {
    "data after the end": (BODY, frame(DATA, END_STREAM, 1, b"late")),
    "headers after the end": (BODY, frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\x01a\x01b")),
    "data after a reset": (frame(RST_STREAM, 0, 1, bytes(4)), frame(DATA, 0, 1, b"late")),
}


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("size", [1, 10, 1000])
async def test_frames_of_a_stream_that_the_client_has_ended_are_an_error(
    late: str, size: int
) -> None:
    """libnghttp2 ignores them."""
    last, more = LATE[late]
    sent = REQUEST + last + more
    async with bare() as one, raw(one, HELLO) as other, raw(one, HELLO) as connection:
        for at in range(0, len(sent), size):
            connection.send(sent[at : at + size])
            await connection.writer.drain()
            await asyncio.sleep(0)
        assert await ended_with(connection) == STREAM_CLOSED
        await other.echoes(1)


async def test_a_lower_stream_after_a_higher_one_is_an_error() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        await connection.echoes(5)
        connection.send(frame(HEADERS, END_HEADERS, 3, headers()))
        assert await ended_with(connection) == PROTOCOL_ERROR


async def test_what_a_client_still_sends_after_an_early_refusal_is_no_error() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Missing")))
        await connection.until(RST_STREAM, 1)
        connection.send(frame(DATA, 0, 1, message(b"x")), frame(DATA, END_STREAM, 1))
        await connection.echoes(3)


async def test_the_audit_ends_and_honest_calls_go_on() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        for stream in range(1, 1201, 2):
            await connection.echoes(stream)
        (server_end,) = one.server._connections
        assert server_end._reader._audit is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", StatusCode.UNIMPLEMENTED),
        (message(b"a") + message(b"b"), StatusCode.UNIMPLEMENTED),
        (b"\0\0", StatusCode.INVALID_ARGUMENT),
        (message(b"abc")[:-1], StatusCode.INVALID_ARGUMENT),
        (b"\x02" + bytes(4), StatusCode.INTERNAL),
        (message(b"abc", 1), StatusCode.INTERNAL),
        (b"\0\xff\xff\xff\xff", StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_request_that_is_not_one_message_gets_a_status(
    body: bytes, code: StatusCode
) -> None:
    async with bare() as one, raw(one, HELLO, REQUEST) as connection:
        connection.send(frame(DATA, END_STREAM, 1, body))
        flags, payload = await connection.until(HEADERS, 1)
        assert flags & END_STREAM
        assert b"grpc-status" + bytes((len(str(code.value[0])),)) + str(code.value[0]).encode() in (
            payload
        )
        await connection.echoes(3)


async def test_a_lost_connection_ends_its_calls() -> None:
    async with bare() as one:
        async with raw(one, HELLO) as connection:
            connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never")), BODY)
            await one.started.wait()
        await one.cancelled.wait()


async def test_the_server_stops_reading_from_a_client_that_does_not_read() -> None:
    limits = TransportLimits(message_bytes=1 << 20, receiving_bytes=1 << 30, streams=20_000)
    async with bare(limits) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=1024)
        try:
            windows = frame(SETTINGS, 0, 0, b"\0\x04\x7f\xff\xff\xff")
            writer.write(HELLO + windows + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\0\0"))
            data = message(bytes(16_000))
            stuck = False
            for number in range(10_000):  # 160 MB: far beyond what sockets hold
                stream = 2 * number + 1
                writer.write(frame(HEADERS, END_HEADERS, stream, headers()))
                writer.write(frame(DATA, END_STREAM, stream, data))
                try:
                    async with asyncio.timeout(1):
                        await writer.drain()
                except TimeoutError:
                    stuck = True
                    break
            assert stuck
            async with raw(one, HELLO) as other:
                await other.echoes(1)
            while not reader.at_eof() and stuck:  # reading continues when the client reads
                await reader.read(1 << 20)
                stuck = writer.transport.get_write_buffer_size() > 0
        finally:
            writer.transport.abort()


async def test_a_flood_of_pings_without_reading_ends_the_connection() -> None:
    async with bare() as one, raw(one, HELLO) as other:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=1024)
        try:
            writer.write(HELLO)
            with suppress(ConnectionError):
                while not writer.transport.is_closing():
                    writer.write(frame(PING, 0, 0, bytes(8)) * 4096)
                    await writer.drain()
        finally:
            writer.transport.abort()
        await other.echoes(1)


async def test_streams_beyond_the_limit_are_refused_and_the_others_live() -> None:
    """The client knows the limit, and does not respect it."""
    async with (
        bare(TransportLimits(1 << 20, 1 << 20, streams=2)) as one,
        raw(one, PREFACE + frame(SETTINGS)) as connection,
    ):
        _, payload = await connection.until(SETTINGS)
        assert b"\0\x03\0\0\0\x02" in payload
        connection.send(frame(SETTINGS, ACK))
        await connection.alive()
        connection.send(*(frame(HEADERS, END_HEADERS, n, headers()) for n in (1, 3, 5, 7)))
        for refused in (5, 7):
            _, payload = await connection.until(RST_STREAM, refused)
            assert int.from_bytes(payload, "big") == REFUSED_STREAM
        connection.send(BODY)
        await connection.until(DATA, 1)
        await connection.echoes(9)


async def test_a_client_that_does_not_know_the_limit_yet_may_exceed_it() -> None:
    """Up to twice the limit; not every client repeats calls that are refused as retriable."""
    async with (
        bare(TransportLimits(1 << 20, 1 << 20, streams=2)) as one,
        raw(one, PREFACE + frame(SETTINGS)) as connection,
    ):
        connection.send(*(frame(HEADERS, END_HEADERS, n, headers()) for n in (1, 3, 5, 7, 9)))
        _, payload = await connection.until(RST_STREAM, 9)
        assert int.from_bytes(payload, "big") == REFUSED_STREAM
        connection.send(*(frame(DATA, END_STREAM, n, message(b"x")) for n in (1, 3, 5, 7)))
        for stream in (1, 3, 5, 7):
            await connection.until(DATA, stream)
        await connection.echoes(11)


async def test_unread_bytes_are_bounded_over_all_connections() -> None:
    limits = TransportLimits(message_bytes=1 << 20, receiving_bytes=1 << 20, streams=100)
    async with bare(limits) as one, raw(one, HELLO) as connection, raw(one, HELLO) as other:
        piece = message(bytes(1 << 20))[: 600 << 10]
        parts = [frame(DATA, 0, 1, piece[at : at + 16384]) for at in range(0, len(piece), 16384)]
        connection.send(REQUEST, *parts)
        await connection.alive()
        other.send(REQUEST, *parts)
        _, payload = await other.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        assert b"grpc-retry-pushback-ms" in payload
        await other.echoes(3)


async def test_a_message_in_tiny_pieces_takes_no_more_memory_than_its_bytes() -> None:
    data = random.Random(1).randbytes(60_000)
    whole = message(data)
    async with bare() as one, raw(one, HELLO, REQUEST) as connection:
        await connection.alive()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for at in range(0, len(whole) - 1, 1000):
            crumbs = whole[at : min(at + 1000, len(whole) - 1)]
            connection.send(*(frame(DATA, 0, 1, crumbs[n : n + 1]) for n in range(len(crumbs))))
            await connection.alive()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held - before < 3 * len(data)  # it was two hundred times
        connection.send(frame(DATA, END_STREAM, 1, whole[-1:]))
        assert (await connection.until(HEADERS, 1))[0] == END_HEADERS
        received = b""
        while len(received) < len(whole):
            received += (await connection.until(DATA, 1))[1]
        assert received == whole


async def test_waiting_empty_messages_are_bounded_too() -> None:
    limits = TransportLimits(message_bytes=1 << 20, receiving_bytes=1 << 20, streams=100)
    async with bare(limits) as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Deaf")))
        connection.send(*(frame(DATA, 0, 1, bytes(5) * 2000) for _ in range(10)))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        await connection.echoes(3)


async def test_calls_that_crossed_the_goaway_are_answered() -> None:
    """A stop that finds no call in progress waits until the other end has understood."""
    async with bare() as one, raw(one, HELLO) as connection, raw(one) as silent:
        await connection.alive()
        stopping = asyncio.create_task(one.server.stop(WAIT_S))
        await connection.until(GOAWAY)
        assert await silent.reader.read() == b""  # it had not begun
        await connection.echoes(1)
        connection.send(frame(PING, ACK, 0, b"retiring"))
        await connection.until(GOAWAY)
        assert await connection.reader.read() == b""
        await stopping


async def test_large_metadata_is_refused_without_harm_to_other_calls() -> None:
    fields = [*ECHO, *((f"x-{n}", "v" * 100) for n in range(150))]
    encoder = Encoder()
    async with bare() as one, raw(one, HELLO) as connection:
        sent = encoder.encode(fields)
        connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, sent))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        assert b"metadata: is" in payload
        connection.send(frame(HEADERS, END_HEADERS, 3, encoder.encode(ECHO)))
        connection.send(frame(DATA, END_STREAM, 3, message(b"x")))
        assert (await connection.until(DATA, 3))[1] == message(b"x")
