"""Peers that speak HTTP/2 to the server: frames written by hand, and the library h2."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc import StatusCode
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from hpack import Decoder

from server.security.principal import Principal
from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.compression import Inflater
from server.transport.connection_limits import ConnectionLimits
from server.transport.grpc_server import GrpcServer
from server.transport.http2.preface import PREFACE
from server.transport.metadata import Trailer
from server.transport.methods import Abort, Method, StreamingMethod, UnaryMethod, WireCall

# Frame types and flags (RFC 9113, 6)
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

# Error codes (RFC 9113, 7)
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM = 11

LIMITS = TransportLimits(message_bytes=4 << 20, receiving_bytes=8 << 20, streams=100)
WAIT_S = 20

ECHO = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test/Echo"),
    (":authority", "here"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def message(data: bytes, compressed: int = 0) -> bytes:
    return bytes((compressed,)) + len(data).to_bytes(4, "big") + data


def headers(fields: list[tuple[str, str]] | None = None, **changed: str) -> bytes:
    """A header block without table references: the headers of an Echo call, with changes."""
    names = {name.replace("_", "-"): value for name, value in changed.items()}
    kept = [(name, names.pop(name.lstrip(":"), value)) for name, value in (fields or ECHO)]
    pairs = [*kept, *names.items()]
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in pairs
    )


HELLO = PREFACE + frame(SETTINGS) + frame(SETTINGS, ACK)
REQUEST = frame(HEADERS, END_HEADERS, 1, headers())
BODY = frame(DATA, END_STREAM, 1, message(b"word"))


@dataclass
class Bare:
    """A server with a few test methods, and records of their calls."""

    port: int = 0
    server: Any = None
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    metadata: list[tuple[str, str | bytes]] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)  # connections that the server cut

    async def echo(self, data: bytes, call: WireCall) -> bytes:
        self.metadata = call.metadata()
        return data

    async def large(self, data: bytes, call: WireCall) -> bytes:
        return bytes(int(data))

    async def never(self, data: bytes, call: WireCall) -> bytes:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def stubborn(self, data: bytes, call: WireCall) -> bytes:
        """Ends only when released, even if it is cancelled."""
        try:
            return await self.never(data, call)
        finally:
            await self.released.wait()

    async def busy(self, data: bytes, call: WireCall) -> bytes:
        time.sleep(0.001)
        return b""

    async def tasks(self, requests: AsyncIterator[bytes], call: WireCall) -> None:
        """Reads its requests in a task of its own."""

        async def read() -> None:
            async for data in requests:
                await call.write(data)

        await asyncio.create_task(read())

    async def refuse(self, data: bytes, call: WireCall) -> bytes:
        details: list[Trailer] = [("why-bin", b"\0\xff\x01"), ("hint", "1")]
        raise Abort(StatusCode.ABORTED, "100 % naïve\n\N{SNOWMAN}", details)

    async def fail(self, data: bytes, call: WireCall) -> bytes:
        raise RuntimeError("a secret")

    async def described(self, data: bytes, call: WireCall) -> bytes:
        """Answers with metadata before and after the message."""
        call.add_initial_metadata([("first", "1"), ("first-bin", b"\0")])
        call.add_trailing_metadata([("last", "2")])
        return data

    async def each(self, requests: AsyncIterator[bytes], call: WireCall) -> None:
        async for data in requests:
            await call.write(data)

    async def deaf(self, requests: AsyncIterator[bytes], call: WireCall) -> None:
        """Reads one request, and the others only after `started` is set."""
        await anext(requests)
        await self.started.wait()
        async for data in requests:
            await call.write(str(len(data)).encode())


def refuse_as_busy(principal: Principal, wait_s: float) -> Abort:
    return Abort(StatusCode.RESOURCE_EXHAUSTED, "")


@asynccontextmanager
async def bare(
    limits: TransportLimits = LIMITS, max_connections: int = 100, max_per_peer: int = 100
) -> AsyncIterator[Bare]:
    one = Bare()

    def count(port: str, reason: str) -> None:
        one.cuts[reason] += 1

    connections = ConnectionLimits(max_connections, max_per_peer, (), count)
    methods: dict[str, Method] = {
        "/test/Echo": UnaryMethod(one.echo),
        "/test/Large": UnaryMethod(one.large),
        "/test/Never": UnaryMethod(one.never),
        "/test/Stubborn": UnaryMethod(one.stubborn),
        "/test/Tasks": StreamingMethod(one.tasks),
        "/test/Busy": UnaryMethod(one.busy, refuse_as_busy),
        "/test/Refuse": UnaryMethod(one.refuse),
        "/test/Fail": UnaryMethod(one.fail),
        "/test/Each": StreamingMethod(one.each),
        "/test/Deaf": StreamingMethod(one.deaf),
        "/test/Described": UnaryMethod(one.described),
    }
    listener = socket.create_server(("127.0.0.1", 0))
    one.port = listener.getsockname()[1]
    with Inflater() as inflater:
        one.server = GrpcServer(methods, limits, inflater, connections=connections)
        async with asyncio.timeout(60):
            await one.server.start(listener)
            try:
                yield one
            finally:
                await one.server.stop(None)
                assert one.server.receiving_bytes == 0  # all received bytes are released


def plain(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header fields as literals without Huffman codes, the length of each text before it."""
    texts = [(len(text) % 128).to_bytes(1, "big") + text for pair in fields for text in pair]
    return b"".join(texts)


@dataclass
class Raw:
    """A connection that sends and receives single frames."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoder: Decoder = field(default_factory=Decoder)

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def frame(self) -> tuple[int, int, int, bytes]:
        """The next frame: kind, flags, stream, payload. Headers are decoded, see `plain`."""
        head = await self.reader.readexactly(9)
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS:
            payload = plain(self.decoder.decode(payload, raw=True))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    async def until(self, kind: int, stream: int | None = None) -> tuple[int, bytes]:
        """Flags and payload of the next frame of this kind; skips all other frames."""
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
    """The error code of the GOAWAY frame; the connection must end after it."""
    _, payload = await connection.until(GOAWAY)
    assert await connection.reader.read() == b""
    return int.from_bytes(payload[4:8], "big")


class H2:
    """A client on the library h2, which raises if the server violates the protocol."""

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
