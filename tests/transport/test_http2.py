"""HTTP/2 and gRPC on the wire: what breaks the protocol, what presses, what is cut in pieces.

The other ends are h2, which keeps to the protocol by itself, frames made by hand, which do not, and
grpcio. What calls mean is tested in test_service.py.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import time
import tracemalloc
import zlib
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc as grpcio
import pytest
import uvloop
from grpc import StatusCode
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    PingAckReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from server.transport import connection as http2
from server.transport import grpc_server as grpc
from server.transport.connection import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
)
from server.transport.grpc_server import (
    Abort,
    Limits,
    Streaming,
    Unary,
)
from server.transport.metadata import (
    Heads,
    Trailer,
    block,
    timeout_s,
    trailer_block,
)

LIMITS = Limits(message_bytes=4 << 20, receiving_bytes=8 << 20, streams=100)
WAIT_S = 20

ECHO = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test/Echo"),
    (":authority", "here"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


# --- frames by hand --------------------------------------------------------------------------


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def message(data: bytes, compressed: int = 0) -> bytes:
    return bytes((compressed,)) + len(data).to_bytes(4, "big") + data


def headers(fields: list[tuple[str, str]] | None = None, **changed: str) -> bytes:
    """A block that no table is needed for; of an Echo, but for what is changed."""
    names = {name.replace("_", "-"): value for name, value in changed.items()}
    kept = [(name, names.pop(name.lstrip(":"), value)) for name, value in (fields or ECHO)]
    pairs = [*kept, *names.items()]
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in pairs
    )


HELLO = PREFACE + frame(SETTINGS)
REQUEST = frame(HEADERS, END_HEADERS, 1, headers())
BODY = frame(DATA, END_STREAM, 1, message(b"word"))


@dataclass
class Bare:
    """A server of a few methods, and what it was asked."""

    port: int = 0
    server: Any = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    metadata: list[tuple[str, str | bytes]] = field(default_factory=list)

    async def echo(self, data: bytes, call: grpc.Call) -> bytes:
        self.metadata = call.metadata()
        return data

    async def large(self, data: bytes, call: grpc.Call) -> bytes:
        return bytes(int(data))

    async def never(self, data: bytes, call: grpc.Call) -> bytes:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def stubborn(self, data: bytes, call: grpc.Call) -> bytes:
        """Takes a while to be cancelled."""
        try:
            return await self.never(data, call)
        finally:
            await self.released.wait()

    async def busy(self, data: bytes, call: grpc.Call) -> bytes:
        time.sleep(0.001)
        return b""

    async def tasks(self, requests: AsyncIterator[bytes], call: grpc.Call) -> None:
        """Reads in a task of its own."""

        async def read() -> None:
            async for data in requests:
                await call.write(data)

        await asyncio.create_task(read())

    async def refuse(self, data: bytes, call: grpc.Call) -> bytes:
        details: list[Trailer] = [("why-bin", b"\0\xff\x01"), ("hint", "1")]
        raise Abort(StatusCode.ABORTED, "100 % naïve\n\N{SNOWMAN}", details)

    async def fail(self, data: bytes, call: grpc.Call) -> bytes:
        raise RuntimeError("a secret")

    async def each(self, requests: AsyncIterator[bytes], call: grpc.Call) -> None:
        async for data in requests:
            await call.write(data)

    async def deaf(self, requests: AsyncIterator[bytes], call: grpc.Call) -> None:
        """Reads one request, and no other until it is told."""
        await anext(requests)
        await self.started.wait()
        async for data in requests:
            await call.write(str(len(data)).encode())


@asynccontextmanager
async def bare(limits: Limits = LIMITS) -> AsyncIterator[Bare]:
    one = Bare()
    methods: dict[str, grpc.Method] = {
        "/test/Echo": Unary(one.echo),
        "/test/Large": Unary(one.large),
        "/test/Never": Unary(one.never),
        "/test/Stubborn": Unary(one.stubborn),
        "/test/Tasks": Streaming(one.tasks),
        "/test/Busy": Unary(one.busy, lambda wait_s: Abort(StatusCode.RESOURCE_EXHAUSTED, "")),
        "/test/Refuse": Unary(one.refuse),
        "/test/Fail": Unary(one.fail),
        "/test/Each": Streaming(one.each),
        "/test/Deaf": Streaming(one.deaf),
    }
    listener = socket.create_server(("127.0.0.1", 0))
    one.port = listener.getsockname()[1]
    one.server = grpc.Server(methods, limits)
    async with asyncio.timeout(60):
        await one.server.start(listener)
        try:
            yield one
        finally:
            await one.server.stop(None)
            assert one.server.receiving_bytes == 0  # nothing of what came is still held


@dataclass
class Raw:
    """A connection of bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def frame(self) -> tuple[int, int, int, bytes]:
        """The next one: kind, flags, stream, payload."""
        head = await self.reader.readexactly(9)
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    async def until(self, kind: int, stream: int | None = None) -> tuple[int, bytes]:
        """Flags and payload of the next frame of a kind, all others passed over."""
        while True:
            found, flags, of, payload = await self.frame()
            if found == kind and stream in (None, of) and not (kind == PING and not flags & ACK):
                return flags, payload

    async def alive(self) -> None:
        self.send(frame(PING, 0, 0, b"01234567"))
        assert (await self.until(PING)) == (ACK, b"01234567")

    async def echoes(self, stream: int) -> None:
        self.send(
            frame(HEADERS, END_HEADERS, stream, headers()),
            frame(DATA, END_STREAM, stream, message(b"sound")),
        )
        assert (await self.until(DATA, stream))[1] == message(b"sound")


@asynccontextmanager
async def raw(one: Bare, *first: bytes) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    try:
        connection = Raw(reader, writer)
        connection.send(*first)
        yield connection
    finally:
        writer.close()


async def ended_with(connection: Raw) -> int:
    """The code of the GOAWAY, behind which the connection ends."""
    _, payload = await connection.until(GOAWAY)
    assert await connection.reader.read() == b""
    return int.from_bytes(payload[4:8], "big")


FAULTS = {
    "no settings first": (PREFACE + frame(PING, 0, 0, bytes(8)), http2.PROTOCOL_ERROR),
    "settings of a stream": (HELLO + frame(SETTINGS, 0, 1), http2.PROTOCOL_ERROR),
    "half a setting": (HELLO + frame(SETTINGS, 0, 0, b"123"), http2.FRAME_SIZE_ERROR),
    "settings answered with something": (
        HELLO + frame(SETTINGS, ACK, 0, bytes(6)),
        http2.FRAME_SIZE_ERROR,
    ),
    "a window too wide": (
        HELLO + frame(SETTINGS, 0, 0, b"\0\x04\xff\xff\xff\xff"),
        http2.FLOW_CONTROL_ERROR,
    ),
    "frames too small": (
        HELLO + frame(SETTINGS, 0, 0, b"\0\x05\0\0\x10\0"),
        http2.PROTOCOL_ERROR,
    ),
    "push 2": (HELLO + frame(SETTINGS, 0, 0, b"\0\x02\0\0\0\x02"), http2.PROTOCOL_ERROR),
    "a push": (HELLO + frame(PUSH_PROMISE, 0, 1, bytes(4)), http2.PROTOCOL_ERROR),
    "a frame too large": (HELLO + b"\xff\xff\xff\0\0\0\0\0\1", http2.FRAME_SIZE_ERROR),
    "a ping too short": (HELLO + frame(PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "a ping of a stream": (HELLO + frame(PING, 0, 1, bytes(8)), http2.PROTOCOL_ERROR),
    "data of the connection": (HELLO + frame(DATA, 0, 0, b"x"), http2.PROTOCOL_ERROR),
    "data of no stream": (HELLO + frame(DATA, 0, 5, b"x"), http2.PROTOCOL_ERROR),
    "a reset of no stream": (HELLO + frame(RST_STREAM, 0, 5, bytes(4)), http2.PROTOCOL_ERROR),
    "a reset too short": (HELLO + REQUEST + frame(RST_STREAM, 0, 1, b"1"), http2.FRAME_SIZE_ERROR),
    "a window of no stream": (
        HELLO + frame(WINDOW_UPDATE, 0, 5, b"\0\0\0\1"),
        http2.PROTOCOL_ERROR,
    ),
    "a window by nothing": (HELLO + frame(WINDOW_UPDATE, 0, 0, bytes(4)), http2.PROTOCOL_ERROR),
    "a window beyond all bounds": (
        HELLO + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        http2.FLOW_CONTROL_ERROR,
    ),
    "a window too short": (HELLO + frame(WINDOW_UPDATE, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "a stream of the server's": (
        HELLO + frame(HEADERS, END_HEADERS, 2, headers()),
        http2.PROTOCOL_ERROR,
    ),
    "headers of the connection": (
        HELLO + frame(HEADERS, END_HEADERS, 0, headers()),
        http2.PROTOCOL_ERROR,
    ),
    "headers that make no sense": (
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        http2.COMPRESSION_ERROR,
    ),
    "headers cut off": (
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\x40\x0aab"),
        http2.COMPRESSION_ERROR,
    ),
    "padding beyond the end": (
        HELLO + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x09abc"),
        http2.PROTOCOL_ERROR,
    ),
    "padding of nothing": (HELLO + REQUEST + frame(DATA, PADDED, 1), http2.PROTOCOL_ERROR),
    "half a priority": (
        HELLO + frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"abc"),
        http2.FRAME_SIZE_ERROR,
    ),
    "a priority of the wrong size": (HELLO + frame(PRIORITY, 0, 1, b"abc"), http2.FRAME_SIZE_ERROR),
    "a priority of the connection": (HELLO + frame(PRIORITY, 0, 0, bytes(5)), http2.PROTOCOL_ERROR),
    "an end of a stream": (HELLO + frame(GOAWAY, 0, 1, bytes(8)), http2.PROTOCOL_ERROR),
    "half an end": (HELLO + frame(GOAWAY, 0, 0, bytes(4)), http2.FRAME_SIZE_ERROR),
    "headers that go on from nothing": (
        HELLO + frame(CONTINUATION, END_HEADERS, 1, headers()),
        http2.PROTOCOL_ERROR,
    ),
    "headers interrupted": (
        HELLO + frame(HEADERS, 0, 1, headers()) + frame(PING, 0, 0, bytes(8)),
        http2.PROTOCOL_ERROR,
    ),
    "headers that go on elsewhere": (
        HELLO + frame(HEADERS, 0, 1, headers()) + frame(CONTINUATION, END_HEADERS, 3),
        http2.PROTOCOL_ERROR,
    ),
    "headers without end": (
        HELLO + frame(HEADERS, 0, 1) + 9 * frame(CONTINUATION, 0, 1, bytes(8192)),
        http2.ENHANCE_YOUR_CALM,
    ),
    "headers that go on with nothing": (
        HELLO + frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1),
        http2.ENHANCE_YOUR_CALM,
    ),
    "headers of one huge frame": (
        HELLO + frame(HEADERS, END_HEADERS, 1, bytes(200_000)),
        http2.ENHANCE_YOUR_CALM,
    ),
    "headers that set the table's size over and over": (
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\x20" * 20_000),
        http2.COMPRESSION_ERROR,
    ),
    "headers that inflate": (
        HELLO
        + frame(HEADERS, END_HEADERS, 1, b"\x40\x01a\x7f\xa1\x17" + b"x" * 3104 + b"\xbe" * 60),
        http2.COMPRESSION_ERROR,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_breaks_the_protocol_ends_its_connection_and_no_other(fault: str) -> None:
    sent, code = FAULTS[fault]
    async with bare() as one, raw(one, HELLO) as other, raw(one, sent) as connection:
        assert await ended_with(connection) == code
        await other.echoes(1)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(HEADERS, END_HEADERS, 1, headers(Upper="x")), http2.PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers(connection="x")), http2.PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers(te="gzip")), http2.PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, headers([(":path", "/")])), http2.PROTOCOL_ERROR),
        (REQUEST + frame(HEADERS, END_HEADERS, 1, headers()), http2.PROTOCOL_ERROR),
        (REQUEST + frame(WINDOW_UPDATE, 0, 1, bytes(4)), http2.PROTOCOL_ERROR),
        (REQUEST + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"), http2.FLOW_CONTROL_ERROR),
    ],
)
async def test_what_breaks_it_within_a_stream_ends_the_stream_alone(sent: bytes, code: int) -> None:
    async with bare() as one, raw(one, HELLO, sent) as connection:
        _, payload = await connection.until(RST_STREAM, 1)
        assert int.from_bytes(payload, "big") == code
        await connection.echoes(3)


async def test_a_stream_beyond_its_window_or_its_end_is_reset() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        await connection.alive()
        never = headers(path="/test/Never")
        connection.send(
            frame(HEADERS, END_HEADERS, 1, never),
            frame(DATA, END_STREAM, 1, message(b"")),
            frame(DATA, 0, 1, b"more"),
        )
        _, payload = await connection.until(RST_STREAM, 1)
        assert int.from_bytes(payload, "big") == http2.STREAM_CLOSED
        # Deaf reads one message and leaves all others: nothing more is granted then.
        deaf = headers(path="/test/Deaf")
        size = 200_000
        connection.send(frame(HEADERS, END_HEADERS, 3, deaf))
        for _ in range(http2.STREAM_WINDOW // size + 3):
            connection.send(frame(DATA, 0, 3, message(bytes(size - 5))))
        _, payload = await connection.until(RST_STREAM, 3)
        assert int.from_bytes(payload, "big") == http2.FLOW_CONTROL_ERROR
        await connection.echoes(5)


@pytest.mark.parametrize("speaks", [b"GET / HTTP/1.1\r\n\r\n", b"POST", b"PRI * HTTP/1.0\r\n"])
async def test_who_speaks_http1_is_told_where_to_go(speaks: bytes) -> None:
    async with bare() as one, raw(one, speaks) as connection:
        answer = await connection.reader.read()
        assert answer.startswith(b"HTTP/1.1 505 ")
        assert b"the HTTP port" in answer


async def test_who_speaks_tls_is_hung_up_on() -> None:
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
async def test_what_is_not_grpc_gets_a_status_of_http(
    changed: dict[str, Any], status: bytes
) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, headers(**changed)))
        flags, payload = await connection.until(HEADERS, 1)
        assert flags & END_STREAM
        assert status in payload
        await connection.echoes(3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
async def test_bytes_may_come_in_pieces_of_any_size(size: int) -> None:
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


async def test_headers_may_come_in_pieces_and_with_padding_and_priority() -> None:
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


async def test_frames_for_streams_that_have_ended_are_passed_over() -> None:
    async with bare() as one, raw(one, HELLO, REQUEST, BODY) as connection:
        await connection.until(DATA, 1)
        connection.send(
            frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
            frame(RST_STREAM, 0, 1, bytes(4)),
            frame(DATA, END_STREAM, 1, b"late"),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\x01a\x01b"),
        )
        await connection.echoes(3)


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


async def test_a_connection_that_is_lost_ends_its_calls() -> None:
    async with bare() as one:
        async with raw(one, HELLO) as connection:
            connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never")), BODY)
            await one.started.wait()
        await one.cancelled.wait()


async def test_an_end_that_takes_nothing_is_not_read_from() -> None:
    """Pings are answered; where the answers are not taken no more pings are."""
    async with bare() as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=1024)
        try:
            writer.write(HELLO)
            flood = frame(PING, 0, 0, bytes(8)) * 4096
            stuck = False
            for _ in range(2000):  # 140 MB: far beyond what sockets hold
                writer.write(flood)
                try:
                    async with asyncio.timeout(1):
                        await writer.drain()
                except TimeoutError:
                    stuck = True
                    break
            assert stuck
            async with raw(one, HELLO) as other:
                await other.echoes(1)
            while not reader.at_eof() and stuck:  # it goes on where the answers are taken
                await reader.read(1 << 20)
                stuck = writer.transport.get_write_buffer_size() > 0
        finally:
            writer.transport.abort()


async def test_streams_beyond_the_limit_may_be_tried_again() -> None:
    async with bare(Limits(1 << 20, 1 << 20, streams=2)) as one, raw(one, HELLO) as connection:
        connection.send(*(frame(HEADERS, END_HEADERS, n, headers()) for n in (1, 3, 5)))
        _, payload = await connection.until(RST_STREAM, 5)
        assert int.from_bytes(payload, "big") == http2.REFUSED_STREAM
        connection.send(BODY)
        await connection.until(DATA, 1)
        await connection.echoes(7)


async def test_what_is_being_received_is_bounded_over_all_connections() -> None:
    limits = Limits(message_bytes=1 << 20, receiving_bytes=1 << 20, streams=100)
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


async def test_a_message_in_crumbs_takes_no_more_memory_than_its_bytes() -> None:
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


async def test_waiting_messages_of_nothing_are_bounded_too() -> None:
    limits = Limits(message_bytes=1 << 20, receiving_bytes=1 << 20, streams=100)
    async with bare(limits) as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(path="/test/Deaf")))
        connection.send(*(frame(DATA, 0, 1, bytes(5) * 2000) for _ in range(10)))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        await connection.echoes(3)


async def test_calls_that_crossed_the_word_of_the_end_are_answered() -> None:
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


async def test_large_metadata_is_refused_and_harms_no_other_call() -> None:
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


# --- h2: an end that keeps to the protocol -----------------------------------------------------


class H2:
    """A client by h2, which raises where the server breaks the protocol."""

    def __init__(self, connection: Raw) -> None:
        self.connection = connection
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))

    def flush(self) -> None:
        self.connection.send(self.h2.data_to_send())

    async def events(self) -> AsyncIterator[Any]:
        while data := await self.connection.reader.read(1 << 16):
            for event in self.h2.receive_data(data):
                yield event
            self.flush()


@asynccontextmanager
async def h2_client(one: Bare, **options: int) -> AsyncIterator[H2]:
    async with raw(one) as connection:
        client = H2(connection)
        client.h2.local_settings = Settings(
            client=True,
            initial_values={getattr(SettingCodes, n.upper()): v for n, v in options.items()},
        )
        client.h2.initiate_connection()
        client.flush()
        yield client


def ask(client: H2, path: str, data: bytes, *, end: bool = True) -> int:
    stream: int = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream, [(n, path if n == ":path" else v) for n, v in ECHO])
    client.h2.send_data(stream, message(data), end_stream=end)
    client.flush()
    return stream


@pytest.mark.parametrize("window", [0, 1, 1000, 65_535, 1 << 20])
async def test_no_more_is_sent_than_the_other_end_takes(window: int) -> None:
    """h2 raises where a window, or the largest frame, is not kept to."""
    sizes = [0, 1, 16_384, 16_385, 100_000, 70_000]
    async with bare() as one, h2_client(one, initial_window_size=window) as client:
        found = {ask(client, "/test/Large", str(size).encode()): bytearray() for size in sizes}
        if not window:
            for stream in found:
                client.h2.increment_flow_control_window(30_000, stream)
            client.flush()
        left = set(found)
        async for event in client.events():
            if isinstance(event, DataReceived):
                found[event.stream_id] += event.data
                if size := event.flow_controlled_length:
                    client.h2.increment_flow_control_window(size)
                    with suppress(StreamClosedError):  # it ended with what came along
                        client.h2.increment_flow_control_window(size, event.stream_id)
            elif isinstance(event, StreamEnded):
                left.discard(event.stream_id)
            if not left:
                break
        assert [bytes(data) for data in found.values()] == [message(bytes(n)) for n in sizes]


async def test_a_window_may_shrink_below_nothing_and_grow_again() -> None:
    async with bare() as one, h2_client(one, initial_window_size=50_000) as client:
        stream = ask(client, "/test/Large", b"200000")
        received = 0
        async for event in client.events():
            if isinstance(event, DataReceived):
                received += len(event.data)
                if received == 50_000:
                    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
                    client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 300_000})
                client.h2.increment_flow_control_window(len(event.data))
            elif isinstance(event, StreamEnded):
                break
        assert (received, stream) == (200_005, 1)


async def test_a_caller_that_gives_up_while_its_answer_waits_is_let_go() -> None:
    async with bare() as one, h2_client(one, initial_window_size=10) as client:
        first = ask(client, "/test/Large", b"100000")
        async for event in client.events():
            if isinstance(event, DataReceived):
                break
        client.h2.reset_stream(first)
        second = ask(client, "/test/Echo", b"abc")
        async for event in client.events():
            if isinstance(event, DataReceived) and event.stream_id == second:
                assert event.data == message(b"abc")
                break


async def test_a_stopping_server_says_so_answers_what_came_and_takes_no_more() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        never = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Never"))
        connection.send(never, BODY)
        await one.started.wait()
        stopping = asyncio.create_task(one.server.stop(WAIT_S))
        _, payload = await connection.until(GOAWAY)
        assert payload == (2**31 - 1).to_bytes(4, "big") + bytes(4)
        await connection.echoes(3)  # it was on its way when it was told
        connection.send(frame(PING, ACK, 0, b"retiring"))
        _, payload = await connection.until(GOAWAY)
        assert payload == (3).to_bytes(4, "big") + bytes(4)
        connection.send(frame(HEADERS, END_HEADERS, 5, headers()), frame(DATA, 0, 5, b"late"))
        stopping_now = asyncio.create_task(one.server.stop(None))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x0214" in payload
        assert await connection.reader.read() == b""
        await asyncio.gather(stopping, stopping_now)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", one.port)


@pytest.mark.parametrize("size", [0, 100, 4095, 65_536])
async def test_an_end_with_a_small_table_of_headers_is_told_that_ours_is_empty(size: int) -> None:
    async with bare() as one, h2_client(one, header_table_size=size) as client:
        for path in ("/test/Echo", "/test/Refuse", "/test/Echo"):
            stream = ask(client, path, b"abc")
            async for event in client.events():
                if isinstance(event, StreamEnded):
                    assert event.stream_id == stream
                    break


@pytest.mark.parametrize("how", ["deadline", "stop"])
async def test_a_stream_that_is_not_taken_ends_all_the_same(how: str) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        timeout = {"grpc_timeout": "100m"} if how == "deadline" else {}
        sent: Any = {"path": "/test/Each", **timeout}
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(**sent)))
        connection.send(frame(DATA, 0, 1, message(bytes(50_000))))
        connection.send(frame(DATA, 0, 1, message(bytes(50_000))))  # windows hold 65,535 bytes
        received = 0
        while received < 65_535:
            received += len((await connection.until(DATA, 1))[1])
        if how == "deadline":
            _, payload = await connection.until(RST_STREAM, 1)
            assert int.from_bytes(payload, "big") == http2.CANCEL
        await one.server.stop(0.1)


async def test_calls_that_come_after_the_grace_are_refused_and_the_stop_ends() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        never = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Stubborn"))
        connection.send(never, BODY)
        await one.started.wait()
        stopping = asyncio.create_task(one.server.stop(0.01))
        await one.cancelled.wait()
        connection.send(frame(HEADERS, END_HEADERS, 3, headers()))  # its body never comes
        _, payload = await connection.until(HEADERS, 3)
        assert b"grpc-status\x0214" in payload
        one.released.set()
        await stopping


async def test_messages_of_a_stream_that_was_reset_are_given_back_once() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        for stream in range(1, 41, 2):
            connection.send(
                frame(HEADERS, END_HEADERS, stream, headers(path="/test/Tasks")),
                frame(DATA, 0, stream, message(bytes(15_000))),
                frame(RST_STREAM, 0, stream, bytes(4)),
            )
        await connection.echoes(41)
        assert one.server.receiving_bytes == 0


async def test_a_request_may_go_on_after_its_answer() -> None:
    """It was refused by its first bytes: the rest is not wanted, and counted for the windows."""
    async with bare() as one, h2_client(one) as client:
        stream = client.h2.get_next_available_stream_id()
        client.h2.send_headers(stream, ECHO)
        client.h2.send_data(stream, b"\0\x7f\xff\xff\xff")
        client.flush()
        async for event in client.events():
            if isinstance(event, StreamReset):
                assert (event.stream_id, event.error_code) == (stream, http2.NO_ERROR)
                break
        client.h2.ping(b"12345678")
        client.flush()
        async for event in client.events():
            if isinstance(event, PingAckReceived):
                break


# --- grpcio ----------------------------------------------------------------------------------


@asynccontextmanager
async def channel(one: Bare, **options: Any) -> AsyncIterator[Any]:
    private = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    target = f"127.0.0.1:{one.port}"
    async with grpcio.aio.insecure_channel(target, options=private, **options) as found:
        yield found


@pytest.mark.parametrize("how", [grpcio.Compression.Gzip, grpcio.Compression.Deflate])
async def test_requests_may_be_compressed(how: grpcio.Compression) -> None:
    async with bare() as one, channel(one, compression=how) as client:
        for data in (b"", b"a" * 100_000, b"abc"):
            assert await client.unary_unary("/test/Echo")(data, timeout=WAIT_S) == data


@pytest.mark.parametrize(
    ("encoding", "data", "code"),
    [
        ("gzip", gzip.compress(bytes(5 << 20), mtime=0), b"8"),
        ("gzip", gzip.compress(b"abc", mtime=0)[:-6], b"3"),
        ("deflate", b"no such thing", b"3"),
        ("gzip", gzip.compress(b"abc", mtime=0) + b"more", b"3"),
        ("br", b"", b"12"),
    ],
    ids=["bomb", "cut off", "noise", "more behind it", "unknown"],
)
async def test_a_compressed_request_that_is_none_or_too_much_gets_a_status(
    encoding: str, data: bytes, code: bytes
) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(grpc_encoding=encoding)
        connection.send(frame(HEADERS, END_HEADERS, 1, sent))
        connection.send(frame(DATA, END_STREAM, 1, message(data, 1)))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status" + bytes((len(code),)) + code in payload
        await connection.echoes(3)


async def test_deflate_is_zlibs() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, headers(grpc_encoding="deflate")))
        connection.send(frame(DATA, END_STREAM, 1, message(zlib.compress(b"abc"), 1)))
        assert (await connection.until(DATA, 1))[1] == message(b"abc")


async def test_a_refusal_brings_its_message_and_details_whole() -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Refuse")(b"", timeout=WAIT_S)
        assert await call.code() == StatusCode.ABORTED
        assert await call.details() == "100 % naïve\n\N{SNOWMAN}"
        assert dict(iter(await call.trailing_metadata())) == {"why-bin": b"\0\xff\x01", "hint": "1"}


async def test_a_mistake_is_internal_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Fail")(b"", timeout=WAIT_S)
        assert (await call.code(), await call.details()) == (StatusCode.INTERNAL, "internal error")
    assert "a secret" in caplog.text


async def test_metadata_comes_as_it_was_sent() -> None:
    async with bare() as one, channel(one) as client:
        sent = (("x-text", "some, text"), ("x-bytes-bin", b"\0\xff"))
        await client.unary_unary("/test/Echo")(b"", timeout=WAIT_S, metadata=sent)
        assert set(sent) <= set(one.metadata)


async def test_a_deadline_ends_the_call_on_both_sides() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(path="/test/Never", grpc_timeout="50m")
        connection.send(frame(HEADERS, END_HEADERS, 1, sent), BODY)
        flags, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x014" in payload
        assert one.cancelled.is_set()


async def test_a_deadline_that_passes_before_the_method_begins_is_answered() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(path="/test/Never", grpc_timeout="0m")
        connection.send(frame(HEADERS, END_HEADERS, 1, sent))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x014" in payload
        assert not one.started.is_set()


async def test_calls_that_would_begin_too_late_are_refused_at_once() -> None:
    """Each takes a millisecond of the loop: of a hundred with 40 ms no more are begun than there
    is time for, once the pace is known."""

    def some(first: int) -> bytes:
        sent = headers(path="/test/Busy", grpc_timeout="40m")
        return b"".join(
            frame(HEADERS, END_HEADERS, n, sent) + frame(DATA, END_STREAM, n, message(b""))
            for n in range(first, first + 200, 2)
        )

    async def statuses(connection: Raw) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        while found.total() < 100:
            flags, payload = await connection.until(HEADERS)
            if flags & END_STREAM:
                found[payload.partition(b"grpc-status")[2][1:2]] += 1
        return found

    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(some(1))
        assert (await statuses(connection))[b"8"] == 0  # nothing is known of the pace
        connection.send(some(1001))
        found = await statuses(connection)
        assert found[b"8"] > 50
        assert found[b"0"] > 0
        await connection.echoes(2001)


async def test_a_call_refused_before_its_body_has_come_is_told_that_nobody_reads_it() -> None:
    """And not where all of it has come with the headers."""
    async with bare() as one, raw(one, HELLO) as connection:
        one.server.backlog = SimpleNamespace(wait_s=1.0)
        sent = headers(path="/test/Busy", grpc_timeout="40m")
        half = frame(HEADERS, END_HEADERS, 1, sent) + frame(DATA, 0, 1, message(b"")[:3])
        connection.send(half, frame(HEADERS, END_HEADERS, 3, sent), frame(DATA, END_STREAM, 3))
        connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 5, sent))
        for stream in (1, 3, 5):
            flags, payload = await connection.until(HEADERS, stream)
            assert flags & END_STREAM
            assert b"grpc-status\x018" in payload
        _, _, stream, code = await connection.frame()
        assert (stream, code) == (1, http2.NO_ERROR.to_bytes(4, "big"))
        connection.send(
            frame(DATA, END_STREAM, 1, message(b"")[3:]), frame(PING, 0, 0, b"12345678")
        )
        _, flags, _, _ = await connection.frame()
        assert flags == ACK


@pytest.mark.parametrize("timeout", ["1", "m", "123456789m", "-1S", "1s", "\N{DIGIT ONE}x"])
async def test_a_timeout_that_is_none_is_told(timeout: str) -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        sent = headers(grpc_timeout=timeout)
        connection.send(frame(HEADERS, END_HEADERS, 1, sent), BODY)
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x013" in payload
        assert b"grpc-timeout: is" in payload


async def test_a_caller_that_cancels_ends_the_method() -> None:
    async with bare() as one, channel(one) as client:
        call = client.unary_unary("/test/Never")(b"")
        await one.started.wait()
        call.cancel()
        await one.cancelled.wait()


async def test_a_stream_is_answered_in_its_order_however_large() -> None:
    sizes = [0, 1, 100_000, 3_000_000, 5, 1_500_000]

    async def requests() -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)

    async with bare() as one, channel(one) as client:
        call = client.stream_stream("/test/Each")(requests(), timeout=WAIT_S)
        assert [len(data) async for data in call] == sizes
        assert await call.code() == StatusCode.OK


async def test_a_method_that_does_not_read_holds_its_caller_up_and_nobody_else() -> None:
    size, count = 300_000, 20

    async def requests() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(size)

    async with bare() as one, channel(one) as client:
        call = client.stream_stream("/test/Deaf")(requests(), timeout=WAIT_S)
        for _ in range(50):
            assert await client.unary_unary("/test/Echo")(bytes(100_000)) == bytes(100_000)
        assert one.server.receiving_bytes < http2.STREAM_WINDOW + size
        one.started.set()
        assert [int(data) async for data in call] == [size] * (count - 1)


async def test_many_calls_of_one_connection_are_each_answered_with_their_own() -> None:
    async with bare() as one, channel(one) as client:
        echo = client.unary_unary("/test/Echo")
        sent = [str(n).encode() * (n % 7 * 1000 + 1) for n in range(1000)]
        for at in range(0, len(sent), 90):
            some = sent[at : at + 90]
            assert await asyncio.gather(*(echo(data, timeout=WAIT_S) for data in some)) == some


def test_all_of_it_runs_under_uvloop_too() -> None:
    """Which the server runs under, and whose transports are not asyncio's."""
    tests: list[Callable[[], Any]] = [
        test_an_end_that_takes_nothing_is_not_read_from,
        test_who_speaks_tls_is_hung_up_on,
        test_a_connection_that_is_lost_ends_its_calls,
        test_a_stream_is_answered_in_its_order_however_large,
        test_a_stopping_server_says_so_answers_what_came_and_takes_no_more,
        lambda: test_no_more_is_sent_than_the_other_end_takes(1000),
        lambda: test_who_speaks_http1_is_told_where_to_go(b"GET / HTTP/1.1\r\n\r\n"),
        *(
            lambda name=name: test_what_breaks_the_protocol_ends_its_connection_and_no_other(name)
            for name in FAULTS
        ),
    ]
    for test in tests:
        uvloop.run(test())


# --- header blocks ---------------------------------------------------------------------------


FIELD = st.tuples(
    st.sampled_from(["a", "grpc-timeout", "x-" + "y" * 40]), st.text("abc", max_size=9)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(FIELD, max_size=4), st.booleans(), st.integers(0, 200))))
def test_blocks_are_read_once_and_mean_the_same(
    requests: list[tuple[list[tuple[str, str]], bool, int]],
) -> None:
    """Whatever the encoder keeps in its table, drops from it, or takes from it."""
    encoder, heads = Encoder(), Heads()
    for fields, resized, size in requests:
        if resized:
            encoder.header_table_size = size
        head = heads.read(encoder.encode([*ECHO, *fields]))
        assert head.path == "/test/Echo"
        assert [(n.decode(), v.decode()) for n, v in head.fields] == [*ECHO[4:], *fields]


def test_a_usual_block_is_read_once() -> None:
    encoder, heads = Encoder(), Heads()
    heads.read(encoder.encode(ECHO))
    usual = encoder.encode(ECHO)
    assert heads.read(usual) is heads.read(encoder.encode(ECHO))


def test_blocks_that_never_repeat_are_not_kept_without_end() -> None:
    heads = Heads()
    for n in range(1000):
        assert heads.read(headers(x=str(n))).fields[-1] == (b"x", str(n).encode())
    assert len(heads._known) <= 128


def test_written_blocks_are_read_by_others() -> None:
    long = "m" * 5000
    fields: Any = Decoder().decode(trailer_block(13, long, [("a-bin", b"\0\1"), ("b", "c" * 127)]))
    found = dict(fields)
    assert found["grpc-message"] == long
    assert b64decode(found["a-bin"] + "=") == b"\0\1"
    assert found["b"] == "c" * 127
    fields = Decoder().decode(block([("x", "y")], 415))
    assert fields == [(":status", "415"), ("x", "y")]


@pytest.mark.parametrize(
    ("text", "seconds"), [("1S", 1.0), ("20m", 0.02), ("5u", 5e-6), ("2H", 7200.0), ("", None)]
)
def test_timeouts(text: str, seconds: float | None) -> None:
    assert timeout_s(text) == (None if seconds is None else pytest.approx(seconds))


# --- noise -----------------------------------------------------------------------------------


NOISE = st.one_of(
    st.binary(max_size=40),
    st.builds(
        frame,
        st.integers(0, 12),
        st.sampled_from([0, 1, 4, 5, 8, 9, 12, 13, 32, 36, 37, 45, 255]),
        st.integers(0, 9),
        st.one_of(
            st.binary(max_size=30),
            st.just(headers()),
            st.just(headers(path="/test/Each")),
            st.just(headers(path="/test/Never", grpc_timeout="1m")),
            st.just(message(b"abc")),
            st.just(message(b"abc") + b"\0\0"),
        ),
    ),
)


class Nowhere(asyncio.Transport):
    """Takes everything."""

    closed = False

    def write(self, data: Any) -> None:
        assert data

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@settings(max_examples=300, deadline=None)
@given(st.lists(NOISE, max_size=12), st.integers(1, 60))
def test_noise_raises_nothing_and_leaves_nothing(noise: list[bytes], size: int) -> None:
    async def run() -> None:
        failures: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        one = Bare()
        methods: dict[str, grpc.Method] = {
            "/test/Echo": Unary(one.echo),
            "/test/Each": Streaming(one.each),
            "/test/Never": Unary(one.never),
        }
        server = grpc.Server(methods, LIMITS)
        connection = server._connection()
        transport = Nowhere()
        connection.connection_made(transport)
        data = HELLO + b"".join(noise)
        for at in range(0, len(data), size):
            connection.data_received(data[at : at + size])
            if at % 5 == 0:
                await asyncio.sleep(0)
        connection.connection_lost(None)
        await server.stop(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert server.receiving_bytes == 0
        assert not connection.streams
        assert not failures
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)), max_size=20))
def test_pieces_of_a_message_hold_little_more_than_themselves(cuts: list[tuple[int, int]]) -> None:
    """Most of what came together is kept as it came, and not copied; a small part of it is, or one
    stream's few bytes would hold all that others have sent beside them."""
    call = grpc.Call.__new__(grpc.Call)
    call._pieces = []
    expected, draw = b"", random.Random(0)
    for size, around in cuts:
        data = draw.randbytes(around) + draw.randbytes(size) + draw.randbytes(around // 2)
        call._piece(data, around, around + size)
        expected += data[around : around + size]
    assert b"".join(call._pieces) == expected
    held = [memoryview(one.obj if isinstance(one, memoryview) else one) for one in call._pieces]
    assert sum(map(len, held)) <= 2 * len(expected)
