"""Floods of gRPC calls and messages on the gRPC port."""

from __future__ import annotations

import gzip
import zlib
from itertools import count

from tests.support.http2_frames import (
    DATA,
    END_HEADERS,
    HEADERS,
    HELLO,
    OPEN_WINDOWS,
    call,
    frame,
    message,
    number,
    request_block,
    submessage,
    varint,
)
from tests.transport.attacks.attack import (
    CLASSIFY,
    DIGIT,
    GET_MODEL,
    HEALTH_CHECK,
    HEALTH_WATCH,
    INFER,
    LIST_MODELS,
    STREAM_INFER,
    Attack,
    Body,
    Pieces,
)
from tests.transport.attacks.floods.frames import HEAD, on_streams

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
MB = 1 << 20


def large_calls(path: str, data: bytes, *more: tuple[bytes, bytes], compressed: int = 0) -> Pieces:
    """The same large call for ever, as fast as the server's windows allow."""
    body = message(data, compressed)
    head = request_block(path, *more)
    yield HELLO + OPEN_WINDOWS
    for stream in count(1, 2):
        yield frame(HEADERS, END_HEADERS, stream, head)
        yield Body(stream, body)


def oversized_prefix(stream: int) -> bytes:
    """The start of a message of 4 GB."""
    start = b"\0" + (2**32 - 1).to_bytes(4, "big")
    return frame(HEADERS, END_HEADERS, stream, HEAD) + frame(DATA, 0, stream, start + bytes(1000))


def held_bodies() -> Pieces:
    """Calls that announce 60 MB, send 64 KB and stop."""
    yield HELLO
    part = b"\0" + (60 * MB).to_bytes(4, "big") + bytes(64_000)
    for stream in range(1, 3000, 2):
        yield frame(HEADERS, END_HEADERS, stream, HEAD)
        yield Body(stream, part, ends=False)


def held_heads() -> Pieces:
    """Requests without body and without end."""
    yield HELLO
    for stream in range(1, 8000, 2):
        yield frame(HEADERS, END_HEADERS, stream, HEAD)


def dripped_body() -> Pieces:
    """One message, a byte at a time, in each of 100 calls."""
    yield HELLO
    streams = range(1, 200, 2)
    for stream in streams:
        start = b"\0" + (1000).to_bytes(4, "big")
        yield frame(HEADERS, END_HEADERS, stream, HEAD) + frame(DATA, 0, stream, start)
    while True:
        yield 0.01
        yield b"".join(frame(DATA, 0, stream, b"\0") for stream in streams)


def messages_of_a_stream(path: str, data: bytes) -> Pieces:
    """One stream with many small messages."""
    yield HELLO + OPEN_WINDOWS + frame(HEADERS, END_HEADERS, 1, request_block(path))
    body = Body(1, message(data) * (100_000 // (len(data) + 5)), ends=False)
    while True:
        yield body


def nested(depth: int) -> bytes:
    """A message of field 3 in a message of field 3, and so on."""
    data = b""
    for _ in range(depth):
        data = submessage(3, data)
    return data


BROKEN_FIRST = submessage(3, b"\xff" * 16) + number(15, 1) * (6 * MB)
UNKNOWN_FIELDS = number(15, 1) * (4 * MB)
EMPTY_IMAGES = submessage(3, b"") * (4 * MB)
GROUPS = (varint(15 << 3 | 3)) * 30_000
UNPACKED_FLOATS = submessage(1, b"lenet5") + submessage(
    5, submessage(5, b"".join(varint(6 << 3 | 5) + bytes(4) for _ in range(1_500_000)))
)
GZIP = (b"grpc-encoding", b"gzip")
DEFLATE = (b"grpc-encoding", b"deflate")


def gzip_bomb() -> bytes:
    """60 MB of nothing, in 60 KB; many members of it would be 4 GB."""
    return gzip.compress(bytes(60 * MB), 9, mtime=0)


FLOODS = (
    Attack("calls-of-health", on_streams(lambda stream: call(stream, HEALTH_CHECK))),
    Attack(
        "calls-of-get-model", on_streams(lambda s: call(s, GET_MODEL, submessage(1, b"lenet5")))
    ),
    Attack("calls-of-list-models", on_streams(lambda stream: call(stream, LIST_MODELS))),
    Attack("calls-of-unknown-methods", on_streams(lambda stream: call(stream, f"/x/{stream}"))),
    Attack(
        "calls-of-classify-that-are-invalid", on_streams(lambda s: call(s, CLASSIFY, b"\xff" * 50))
    ),
    Attack(
        "calls-of-classify-unread",
        on_streams(lambda s: call(s, CLASSIFY, DIGIT)),
        reads=False,
        is_overload=True,
    ),
    Attack(
        "calls-with-past-deadlines",
        on_streams(lambda s: call(s, CLASSIFY, DIGIT, (b"grpc-timeout", b"1n"))),
        is_overload=True,
    ),
    Attack(
        "watches-of-health", on_streams(lambda stream: call(stream, HEALTH_WATCH)), connections=4
    ),
    Attack("stream-of-bad-infers", lambda: messages_of_a_stream(STREAM_INFER, b"")),
    Attack("stream-of-reflection", lambda: messages_of_a_stream(REFLECTION, submessage(7, b""))),
    Attack(
        "stream-of-reflection-unread",
        lambda: messages_of_a_stream(REFLECTION, submessage(4, b"convserve.v1.Classifier")),
        reads=False,
    ),
    Attack("message-with-oversized-prefix", on_streams(oversized_prefix)),
    Attack("message-held", held_bodies, connections=4, max_growth_bytes=600 * MB),
    Attack("message-dripped", dripped_body, connections=4),
    Attack("head-held", held_heads, connections=4),
    Attack("protobuf-nested-3000", on_streams(lambda s: call(s, CLASSIFY, nested(3_000)[:16_000]))),
    Attack("protobuf-broken-first", lambda: large_calls(CLASSIFY, BROKEN_FIRST)),
    Attack("protobuf-unknown-fields", lambda: large_calls(CLASSIFY, UNKNOWN_FIELDS)),
    Attack("protobuf-empty-images", lambda: large_calls(CLASSIFY, EMPTY_IMAGES)),
    Attack("protobuf-groups", lambda: large_calls(CLASSIFY, GROUPS)),
    Attack("protobuf-unpacked-floats", lambda: large_calls(INFER, UNPACKED_FLOATS)),
    Attack(
        "gzip-bomb",
        lambda: large_calls(CLASSIFY, gzip_bomb(), GZIP, compressed=1),
        max_growth_bytes=400 * MB,
    ),
    Attack(
        "gzip-bomb-of-many-members",
        lambda: large_calls(CLASSIFY, gzip_bomb() * 60, GZIP, compressed=1),
        max_growth_bytes=400 * MB,
    ),
    Attack(
        "deflate-bomb",
        lambda: large_calls(CLASSIFY, zlib.compress(bytes(63 * MB), 9), DEFLATE, compressed=1),
        max_growth_bytes=400 * MB,
    ),
)
