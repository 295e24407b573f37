"""Frames and header blocks for the server's end of an HTTP/2 connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from hpack import Encoder

from server.transport.compression import Inflater
from server.transport.grpc_server import GrpcServer
from server.transport.methods import Method, StreamingMethod, UnaryMethod, WireCall
from tests.fuzz.mutate import INTERESTING, mutated, sometimes_mutated
from tests.fuzz.target import Feed, Target
from tests.support.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HELLO,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    frame,
    indexed,
    indexed_literal,
    literal,
    message,
    table_size,
)
from tests.support.http2_peers import LIMITS, Bare

PATHS = (
    b"/test/Echo",
    b"/test/Each",
    b"/test/Never",
    b"/test/Refuse",
    b"/nothing",
    b"",
    b"*",
    b"x",
)
FIELDS = (
    (b":method", (b"POST", b"GET", b"CONNECT", b"")),
    (b":scheme", (b"http", b"https", b"")),
    (b":path", PATHS),
    (b":authority", (b"here", b"")),
    (b"te", (b"trailers", b"gzip")),
    (b"content-type", (b"application/grpc", b"application/grpc+proto", b"text/plain")),
)
MORE = (
    (b"grpc-timeout", (b"1S", b"1n", b"0H", b"99999999H", b"-1S", b"1", b"")),
    (b"grpc-encoding", (b"gzip", b"identity", b"deflate", b"br")),
    (b"content-length", (b"0", b"9", b"-1", b"99999999999999999999")),
    (b"connection", (b"close",)),
    (b"a-bin", (b"AAEC", b"!!", b"AA==")),
    (b"UPPER", (b"a",)),
    (b":status", (b"200",)),
    (b"a", (b"b", b"b\r\nc", b"\0", b"\xff", b" ", bytes(2000))),
)
MAX_END_S = 1.0  # for the calls of a connection, after it is lost


class Nowhere(asyncio.Transport):
    """The end of a connection whose peer reads nothing, and whose input the test makes."""

    def write(self, data: Any) -> None: ...

    def writelines(self, data: Any) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def header_block(draw: Random, encoder: Encoder) -> bytes:
    """A request's headers: complete or not, in one of the ways of RFC 7541."""
    fields = [
        (name, values[0] if draw.random() < 0.9 else draw.choice(values))
        for name, values in FIELDS
        if draw.random() < 0.98
    ]
    for name, values in draw.sample(MORE, draw.choice((0, 0, 1, 2))):
        fields.append((name, draw.choice(values)))
    if draw.random() < 0.1:
        draw.shuffle(fields)
    if draw.random() < 0.5:
        encoded = encoder.encode(fields, huffman=draw.random() < 0.5)
    else:
        kinds = (literal, literal, indexed_literal)
        encoded = b"".join(draw.choice(kinds)(name, value) for name, value in fields)
    match draw.randrange(12):
        case 0:
            encoded = table_size(draw.choice((0, 100, 4096, 1 << 20))) + encoded
        case 1:
            encoded += indexed(draw.choice((1, 2, 61, 62, 63, 70, 200, 1 << 20)))
        case 2:
            encoded = mutated(encoded, draw)
        case 3:
            encoded += literal(b"a", b"b") * draw.choice((50, 150, 500))
    return encoded


def request(draw: Random, stream: int, encoder: Encoder) -> Iterator[bytes]:
    """The frames of one call."""
    block = header_block(draw, encoder)
    flags = END_STREAM if draw.random() < 0.1 else 0
    if draw.random() < 0.1:
        block, flags = bytes(draw.choice((0, 5))) + block, flags | WITH_PRIORITY
    cut = draw.randint(0, len(block)) if draw.random() < 0.2 else len(block)
    yield frame(HEADERS, flags | (END_HEADERS if cut == len(block) else 0), stream, block[:cut])
    if cut < len(block):
        yield frame(CONTINUATION, END_HEADERS, stream, block[cut:])
    messages = draw.choice((0, 1, 1, 1, 1, 3))
    for number in range(messages):
        body = sometimes_mutated(message(draw.randbytes(draw.choice((0, 3, 300)))), draw, 0.2)
        cut = draw.randint(0, len(body))
        if draw.random() < 0.2:
            yield frame(DATA, PADDED, stream, bytes((draw.choice((0, 3, 255)),)) + body[:cut])
        else:
            yield frame(DATA, 0, stream, body[:cut])
        ends = draw.random() < (0.9 if number == messages - 1 else 0.1)
        yield frame(DATA, END_STREAM if ends else 0, stream, body[cut:])


def other_frame(draw: Random) -> bytes:
    """A frame that is no request."""
    stream = draw.choice((0, 0, 1, 3, 5, 2, 7, 2**31 - 1, 2**32 - 1))
    number = draw.choice(INTERESTING) % (1 << 32)
    match draw.randrange(8):
        case 0:
            name, value = draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 99)), number
            pairs = (name.to_bytes(2, "big") + value.to_bytes(4, "big")) * draw.choice((1, 40))
            return frame(SETTINGS, draw.choice((0, 0, ACK)), 0, pairs)
        case 1:
            return frame(WINDOW_UPDATE, 0, stream, number.to_bytes(4, "big"))
        case 2:
            return frame(RST_STREAM, 0, stream, number.to_bytes(4, "big"))
        case 3:
            return frame(PING, draw.choice((0, ACK)), 0, draw.randbytes(draw.choice((8, 8, 7))))
        case 4:
            return frame(PRIORITY, 0, stream, draw.randbytes(draw.choice((5, 5, 4))))
        case 5:
            return frame(GOAWAY, 0, 0, draw.randbytes(draw.choice((8, 20, 3))))
        case 6:
            return frame(PUSH_PROMISE, END_HEADERS, stream, draw.randbytes(6))
    return frame(
        draw.randrange(256), draw.randrange(256), stream, draw.randbytes(draw.randrange(30))
    )


def make(draw: Random) -> bytes:
    encoder = Encoder()
    frames = [HELLO]
    for stream in range(1, 2 * draw.choice((1, 2, 4)), 2):
        frames += request(draw, stream, encoder)
        if draw.random() < 0.4:
            frames.append(other_frame(draw))
    if draw.random() < 0.1:
        draw.shuffle(frames)
    return sometimes_mutated(b"".join(frames), draw, 0.3)


class LeftBehind(AssertionError):
    """A connection has ended, and something of it is still there."""


@contextmanager
def connections() -> Iterator[Feed]:
    """Each input is a connection of its own, to one server."""
    loop = asyncio.new_event_loop()
    failures: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    one = Bare()
    called: list[bytes] = []

    async def echo(data: bytes, call: WireCall) -> bytes:
        called.append(data)
        return data

    methods: dict[str, Method] = {
        "/test/Echo": UnaryMethod(echo),
        "/test/Refuse": UnaryMethod(one.refuse),
        "/test/Each": StreamingMethod(one.each),
        "/test/Never": UnaryMethod(one.never),
    }

    async def started() -> GrpcServer:
        return GrpcServer(methods, LIMITS, inflater)

    inflater = Inflater()
    server = loop.run_until_complete(started())

    async def connect(data: bytes) -> bool:
        """Returns whether Echo was called."""
        called.clear()
        connection = server._new_connection()
        connection.connection_made(Nowhere())
        size = 1 + len(data) // (1 + len(data) % 5)
        for start in range(0, len(data), size):
            connection.data_received(data[start : start + size])
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        is_called = bool(called)
        connection.connection_lost(None)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=MAX_END_S)
        if failures:
            raise LeftBehind(failures.pop())
        if connection.streams or server.receiving_bytes:
            raise LeftBehind(f"{len(connection.streams)} streams, {server.receiving_bytes} bytes")
        if len(asyncio.all_tasks()) > 1:
            raise LeftBehind(asyncio.all_tasks())
        return is_called

    try:
        yield lambda data: loop.run_until_complete(connect(data))
        loop.run_until_complete(server.stop(None))
    finally:
        inflater.__exit__()
        loop.close()


TARGETS = (Target("frames", make, connections, 0.08),)
