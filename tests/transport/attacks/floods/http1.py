"""Attacks on the HTTP port."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from itertools import count

from tests.transport.attacks.attack import Attack, Pieces
from tests.transport.attacks.floods.connections import MANY, bytes_of, garbage, silent

MB = 1 << 20
INFER = b"/v2/models/lenet5/infer"
CLASSIFY = b"/v1/models/lenet5:classify"


def head(method: bytes, path: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join((method + b" " + path + b" HTTP/1.1", b"host: here", *lines, b"", b""))


def post(path: bytes, body: bytes, *lines: bytes) -> bytes:
    return head(b"POST", path, b"content-length: %d" % len(body), *lines) + body


def again(request: bytes) -> Callable[[], Pieces]:
    """The same request for ever, without waiting for responses."""
    piece = request * max(1, (64 << 10) // len(request))

    def pieces() -> Pieces:
        while True:
            yield piece

    return pieces


def endless(start: bytes, part: bytes) -> Callable[[], Pieces]:
    """A request whose end never comes."""
    piece = part * max(1, (64 << 10) // len(part))

    def pieces() -> Pieces:
        yield start
        while True:
            yield piece

    return pieces


def slow_head() -> Pieces:
    yield from bytes_of(head(b"GET", b"/healthz", b"a: " + b"x" * 1000), 0.1)


def slow_body() -> Pieces:
    yield head(b"POST", INFER, b"content-length: 10000000")
    while True:
        yield b"{"
        yield 0.1


def held_body() -> Pieces:
    """60 MB are announced, one is sent."""
    yield head(b"POST", INFER, b"content-length: 60000000") + b" " * MB


def many_fields() -> Pieces:
    yield b"GET /healthz HTTP/1.1\r\nhost: here\r\n"
    for number in count():
        yield b"".join(b"a%d: b\r\n" % (number * 100 + one) for one in range(100))


def png(width: int, height: int) -> bytes:
    """A PNG of one colour: few bytes, many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = zlib.compress(bytes((width + 1) * height), 9)
    shape = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape)
    return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


CHUNKED = head(b"POST", INFER, b"transfer-encoding: chunked")
TENSOR = b'{"inputs":[{"name":"image","shape":[1],"datatype":"UINT8","data":'
NUMBERS = TENSOR + b"[" + b"1," * (8 * MB) + b"1]}]}"
NESTED = TENSOR + b"[" * (8 * MB)
BIG_NUMBERS = TENSOR + b"[" + b",".join([b"9" * 4000] * 2_000) + b"]}]}"
OBJECTS = (
    b'{"parameters":{' + b",".join(b'"%d":1' % one for one in range(500_000)) + b'},"inputs":[]}'
)
TENSORS = json.dumps(
    {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": []}] * 60_000}
).encode()
FORM = b"content-type: multipart/form-data; boundary=b"
PARTS = b"--b\r\ncontent-disposition: form-data; name=a\r\n\r\n\r\n" * 100_000 + b"--b--\r\n"
PART_HEAD = b"--b\r\n" + b"a: b\r\n" * 500_000 + b"\r\n\r\n--b--\r\n"
GZIP = b"content-encoding: gzip"
IMAGE = b"content-type: image/png"

FLOODS = tuple(
    Attack(f"http-{name}", pieces, "http", connections, reads, growth)
    for name, pieces, connections, reads, growth in (
        ("connections-silent", silent, MANY, True, 64 * MB),
        ("connections-of-garbage", garbage, 20, True, 64 * MB),
        ("slow-head", slow_head, 500, True, 64 * MB),
        ("slow-body", slow_body, 500, True, 64 * MB),
        ("body-held", held_body, 60, True, 200 * MB),
        ("endless-fields", many_fields, 4, True, 64 * MB),
        ("endless-field", endless(b"GET / HTTP/1.1\r\na: ", b"x"), 4, True, 64 * MB),
        ("endless-target", endless(b"GET /", b"x"), 4, True, 64 * MB),
        ("endless-trailers", endless(CHUNKED + b"0\r\n", b"a: b\r\n"), 4, True, 64 * MB),
        ("one-byte-chunks", endless(CHUNKED, b"1\r\n \r\n"), 4, True, 100 * MB),
        ("chunk-extensions", endless(CHUNKED + b"1;", b"x"), 4, True, 64 * MB),
        ("chunk-size-endless", endless(CHUNKED, b"0"), 4, True, 64 * MB),
        ("pipelined-healthz", again(head(b"GET", b"/healthz")), 4, True, 64 * MB),
        ("pipelined-healthz-unread", again(head(b"GET", b"/healthz")), 4, False, 64 * MB),
        ("pipelined-metrics", again(head(b"GET", b"/metrics")), 4, True, 64 * MB),
        ("pipelined-metrics-unread", again(head(b"GET", b"/metrics")), 4, False, 64 * MB),
        ("pipelined-unknown-paths", again(head(b"GET", b"/nothing")), 4, True, 64 * MB),
        ("pipelined-index", again(post(b"/v2/repository/index", b"")), 4, True, 64 * MB),
        ("expect-continue", again(post(INFER, b"{}", b"expect: 100-continue")), 4, True, 64 * MB),
        ("json-numbers", again(post(INFER, NUMBERS)), 4, True, 500 * MB),
        ("json-nested", again(post(INFER, NESTED)), 4, True, 500 * MB),
        ("json-big-numbers", again(post(INFER, BIG_NUMBERS)), 4, True, 500 * MB),
        ("json-objects", again(post(INFER, OBJECTS)), 4, True, 500 * MB),
        ("json-tensors", again(post(INFER, TENSORS)), 4, True, 500 * MB),
        ("form-parts", again(post(CLASSIFY, PARTS, FORM)), 4, True, 600 * MB),
        ("form-part-head", again(post(CLASSIFY, PART_HEAD, FORM)), 4, True, 600 * MB),
        (
            "gzip-bomb",
            again(post(INFER, gzip.compress(bytes(60 * MB), 9), GZIP)),
            4,
            True,
            500 * MB,
        ),
        ("image-bomb", again(post(CLASSIFY, png(7000, 7000), IMAGE)), 4, True, 1400 * MB),
        ("image-broken", again(post(CLASSIFY, png(700, 700)[:-30], IMAGE)), 4, True, 200 * MB),
    )
)
