"""Servers for tests of the load generator's calls: convserve's, grpcio's, one by h2, raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings

from convserve_client.loadgen.wire.call import CODES, UnaryCall
from convserve_client.loadgen.wire.channel import MAX_CONNECTIONS, Channel, call_and_wait
from tests.support.http2_peers import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    SETTINGS,
    Raw,
    bare,
    frame,
    message,
)

TIMEOUT_S = 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ECHO = "/test/Echo"
INADEQUATE_SECURITY = 12  # error code
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 3, 4, 5  # settings
DEFAULT_FRAME_BYTES = 16_384

RESPONSE_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
OK_TRAILERS = [("grpc-status", "0")]


def setting(name: int, value: int) -> bytes:
    return name.to_bytes(2, "big") + value.to_bytes(4, "big")


def plain_block(fields: list[tuple[str, str]]) -> bytes:
    """A header block that uses no table."""
    return b"".join(
        b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields
    )


def answer_frames(stream: int, data: bytes = b"word") -> bytes:
    return (
        frame(HEADERS, END_HEADERS, stream, plain_block(RESPONSE_HEADERS))
        + frame(DATA, 0, stream, message(data))
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, plain_block(OK_TRAILERS))
    )


def refusal_frames(stream: int, *fields: tuple[str, str]) -> bytes:
    return frame(
        HEADERS, END_HEADERS | END_STREAM, stream, plain_block([*RESPONSE_HEADERS, *fields])
    )


@dataclass
class RawServer:
    """Accepts connections; a test sends the bytes."""

    port: int = 0
    accepted: asyncio.Queue[Raw] = field(default_factory=asyncio.Queue)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def accept(self, settings: bytes = b"") -> Raw:
        """The next connection, after both sides have sent SETTINGS."""
        connection = await self.accepted.get()
        assert await connection.reader.readexactly(len(PREFACE)) == PREFACE
        connection.send(frame(SETTINGS, 0, 0, settings), frame(SETTINGS, ACK))
        return connection


@asynccontextmanager
async def raw_server() -> AsyncIterator[RawServer]:
    one, writers = RawServer(), []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        one.accepted.put_nowait(Raw(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(60):
            yield one
    finally:
        server.close()
        for writer in writers:
            writer.close()


@asynccontextmanager
async def channel_to(
    target: str, method: str = ECHO, max_connections: int = MAX_CONNECTIONS
) -> AsyncIterator[Channel]:
    channel = Channel(target, method, max_connections=max_connections)
    await channel.connect()
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def connected(settings: bytes = b"") -> AsyncIterator[tuple[RawServer, Channel, Raw]]:
    """A raw server, a channel to it, and the connection between them."""
    async with raw_server() as one:
        channel = Channel(one.target, ECHO)
        connecting = asyncio.create_task(channel.connect())
        connection = await one.accept(settings)
        await connecting
        try:
            yield one, channel, connection
        finally:
            await channel.close()


def start_call(
    channel: Channel, data: bytes = b"word", timeout_s: float = TIMEOUT_S
) -> asyncio.Task[UnaryCall]:
    return asyncio.create_task(call_and_wait(channel, data, timeout_s))


def status_of(call: UnaryCall) -> str:
    return CODES[call.code].name


@asynccontextmanager
async def grpcio_server() -> AsyncIterator[str]:
    """Target of a server by grpcio."""

    async def echo(data: bytes, context: Any) -> bytes:
        return data

    async def never(data: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def refuse(data: bytes, context: Any) -> bytes:
        trailing = (("why-bin", b"\0\xff\x01"), ("hint", "1"))
        await context.abort(grpc.StatusCode.ABORTED, "100 % naïve\n\N{SNOWMAN}", trailing)
        raise AssertionError

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    methods = {
        name: grpc.unary_unary_rpc_method_handler(method)
        for name, method in (("Echo", echo), ("Never", never), ("Refuse", refuse))
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(60):
            yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def convserve_server() -> AsyncIterator[str]:
    async with bare() as one:
        yield f"127.0.0.1:{one.port}"


class StrictServer(asyncio.Protocol):
    """Echo server by h2, which raises if the client violates the protocol."""

    def __init__(self, options: dict[str, int]) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = Settings(
            client=False,
            initial_values={getattr(SettingCodes, name): v for name, v in options.items()},
        )
        self.h2.max_inbound_frame_size = options.get("MAX_FRAME_SIZE", DEFAULT_FRAME_BYTES)
        self.bodies: dict[int, bytearray] = {}
        self.headers: list[Any] = []
        self.max_open = 0
        self.resets: list[int] = []
        self.errors: list[Exception] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.h2.initiate_connection()
        self.transport.write(self.h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        try:
            for event in self.h2.receive_data(data):
                self.take(event)
            self.transport.write(self.h2.data_to_send())
        except Exception as error:
            self.errors.append(error)
            self.transport.abort()

    def take(self, event: Any) -> None:
        if isinstance(event, RequestReceived):
            self.headers.append(list(event.headers))
            self.bodies[event.stream_id] = bytearray()
            self.max_open = max(self.max_open, len(self.bodies))
        elif isinstance(event, DataReceived):
            self.bodies[event.stream_id] += event.data
            if size := event.flow_controlled_length:
                self.h2.increment_flow_control_window(size)
                if event.stream_ended is None:
                    self.h2.increment_flow_control_window(size, event.stream_id)
        elif isinstance(event, StreamReset):
            self.resets.append(event.error_code)
        elif isinstance(event, StreamEnded):
            stream = event.stream_id
            body = bytes(self.bodies.pop(stream))
            # Answers later, so that the client opens as many streams as it can.
            asyncio.get_running_loop().call_later(0.001, self.answer, stream, body)
            self.bodies[stream] = bytearray()

    def answer(self, stream: int, body: bytes) -> None:
        del self.bodies[stream]
        if self.transport.is_closing():
            return
        self.h2.send_headers(stream, RESPONSE_HEADERS)
        for at in range(0, len(body), 1000):  # in several frames
            self.h2.send_data(stream, body[at : at + 1000], pad_length=at % 7 or None)
        self.h2.send_headers(stream, OK_TRAILERS, end_stream=True)
        self.transport.write(self.h2.data_to_send())


@asynccontextmanager
async def strict_server(**options: int) -> AsyncIterator[tuple[str, StrictServer]]:
    one = StrictServer(options)
    server = await asyncio.get_running_loop().create_server(lambda: one, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(60):
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", one
    finally:
        server.close()
    assert one.errors == []
