"""Bodies of the HTTP port: JSON, forms, base64, compressed data, and requests to a real server."""

from __future__ import annotations

import gzip
import http.client
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import h11
import msgspec

from server.api.http.form import parse_form
from server.api.http.protocol.parser import Http1Parser
from server.api.v2.base64_text import NotBase64, decode_base64
from server.api.v2.json_codec import decode_request
from server.api.v2.json_tensors import files_from_json, numbers_from_json
from server.errors import InvalidInput
from server.transport.compression import DecompressionError, InflateStream, TooLargeError
from tests.fuzz.mutate import json_text, sometimes_mutated
from tests.fuzz.target import Feed, Target, parser
from tests.fuzz.targets.messages import MAX_FIELDS, WrongStatus
from tests.support.serving import SHAPE, publish
from tests.transport.attacks.processes import convserve

PIXELS = [0] * (SHAPE[0] * SHAPE[1] * SHAPE[2])
REQUEST = {
    "id": "a",
    "parameters": {"priority": 1, "binary_data_output": False},
    "inputs": [
        {
            "name": "image",
            "shape": [1, *SHAPE],
            "datatype": "UINT8",
            "parameters": {},
            "data": PIXELS,
        }
    ],
    "outputs": [{"name": "classes", "parameters": {"classification": 2, "binary_data": False}}],
}
INFER = "/v2/models/tiny/infer"
PATHS = (
    INFER, INFER, INFER, "/v2/models/tiny/versions/1/infer", "/v1/models/tiny:classify",
    "/v2/models/tiny", "/v2/models/%00", "/v2/repository/index", "/healthz", "/metrics",
    "/v2/models/tiny/stats?x=%ff", "/v2/../..", "//", "/v2/models/t%2Finy/ready",
)  # fmt: skip
FORM = "multipart/form-data; boundary=line"
LIMIT_BYTES = 100_000
HEADERS = (
    b"content-length: 2", b"content-length: 2\r\ncontent-length: 3", b"content-length: -1",
    b"content-length: +2", b"content-length: 99999999999999999999", b"transfer-encoding: chunked",
    b"transfer-encoding: chunked, chunked", b"transfer-encoding: gzip",
    b"transfer-encoding:chunked", b"transfer-encoding : chunked", b" x: folded", b"x: a\0b",
    b"expect: 100-continue",
    b"connection: upgrade\r\nupgrade: h2c", b"x: " + b"y" * 3000, b"connection: close",
)  # fmt: skip
NOT_JSON = (InvalidInput, msgspec.DecodeError)


def make_json(draw: Random) -> bytes:
    return json_text(REQUEST, draw)


def parse_json(data: bytes) -> None:
    """Every third body ends with binary data."""
    json_bytes = len(data) - (len(data) % 3 == 0) * min(len(data), 9)
    decode_request("tiny", "", data, json_bytes, MAX_FIELDS)


def make_numbers(draw: Random) -> bytes:
    numbers = [draw.choice((0, 7, 255, 256, -1, 1.5)) for _ in range(draw.choice((1, 6, 40)))]
    shaped = [numbers, numbers] if draw.random() < 0.5 else numbers
    return json_text(shaped if draw.random() < 0.5 else [draw.choice((0, 255))] * 6, draw)


def parse_numbers(data: bytes) -> None:
    """What follows `"data":` is one JSON value by then."""
    msgspec.json.decode(data, type=msgspec.Raw)
    numbers_from_json(data, (2, 3), "inputs[0].data")


def make_files(draw: Random) -> bytes:
    return json_text([["R0lGODlh", "AAAA"], ["aGVsbG8=", ""]][draw.randrange(2)], draw)


def parse_files(data: bytes) -> None:
    msgspec.json.decode(data, type=msgspec.Raw)
    files_from_json(data, "inputs[0].data")


def make_base64(draw: Random) -> bytes:
    text = draw.choice(
        (b"R0lGODlhAQABAIAAAA==", b"a-_b", b"data:image/png;base64,AAAA", b"AA%3D%3D")
    )
    return sometimes_mutated(text * draw.choice((1, 1, 30)), draw)


def make_form(draw: Random) -> bytes:
    name = draw.choice((b"image", b"model", b"", b"\xff"))
    file = draw.choice((b'; filename="a.jpg"', b"", b"; filename*=utf-8''a"))
    more = draw.choice((b"", b"content-transfer-encoding: base64\r\n", b"a:\r\n", b": b\r\n"))
    part = b'--line\r\ncontent-disposition: form-data; name="%s"%s\r\n%s\r\nGIF89a\r\n' % (
        name,
        file,
        more,
    )
    whole = part * draw.choice((1, 1, 2, 9)) + draw.choice((b"--line--\r\n", b"--line\r\n", b""))
    return sometimes_mutated(whole, draw)


def parse_whole_form(data: bytes) -> None:
    parse_form(data, FORM)


def make_compressed(draw: Random) -> bytes:
    content = draw.randbytes(10) * draw.choice((0, 1, 100, 20_000))
    level = draw.randrange(10)
    packed = gzip.compress(content, level, mtime=0) * draw.choice((1, 1, 2, 100))
    if draw.random() < 0.3:
        packed = zlib.compress(content, level)
    return bytes((draw.random() < 0.5,)) + sometimes_mutated(packed, draw)


def decompress(data: bytes) -> None:
    encoding = "gzip" if data[:1] == b"\0" else "deflate"
    stream, size = InflateStream(data[1:], encoding, LIMIT_BYTES), 0
    while not stream.is_done:
        size += stream.next_piece()
    if size > LIMIT_BYTES:
        raise AssertionError("the result is above its limit")


def make_request(draw: Random) -> bytes:
    """Method, path, headers and body, as JSON."""
    headers = {}
    if draw.random() < 0.2:
        headers["Inference-Header-Content-Length"] = draw.choice(("0", "5", "-1", "x", "9" * 30))
    if draw.random() < 0.1:
        headers["Content-Encoding"] = draw.choice(("gzip", "deflate", "br", "identity"))
    if draw.random() < 0.1:
        headers["Grpc-Timeout"] = draw.choice(("1S", "x", "", "100m", "99999999H"))
    body = make_json(draw)
    if draw.random() < 0.2:
        body, headers["Content-Type"] = make_form(draw), FORM
    one = (
        draw.choice(("POST", "POST", "POST", "GET", "OPTIONS", "HEAD", "PUT")),
        draw.choice(PATHS),
        headers,
        body.hex(),
    )
    return json.dumps(one).encode()


def make_http1(draw: Random) -> bytes:
    """One or two requests of HTTP/1.1, sometimes with changed bytes."""
    whole = b""
    for _ in range(draw.choice((1, 1, 2))):
        lines = [
            draw.choice((b"GET ", b"POST ", b"post ", b""))
            + draw.choice(PATHS).encode()
            + draw.choice((b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b"")),
            draw.choice((b"host: here", b"host:", b"Host: a\r\nHost: b", b"")),
            *draw.sample(HEADERS, draw.choice((0, 1, 1, 2))),
        ]
        body = draw.choice(
            (b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n")
        )
        whole += b"\r\n".join((*lines, b"", body))
    return sometimes_mutated(whole, draw, 0.4)


def parse_http1(data: bytes) -> None:
    """Feeds the parser piece by piece, as a connection does."""
    parser, size = Http1Parser(), 1 + len(data) // (1 + len(data) % 4)
    requests = 0
    for start in range(0, len(data), size):
        parser.receive_data(data[start : start + size])
        while (event := parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            requests += isinstance(event, h11.EndOfMessage)
    if not requests:
        raise Incomplete


class Incomplete(Exception):
    """The bytes hold no whole request."""


@contextmanager
def requests() -> Iterator[Feed]:
    """Each input is a request to a real server."""
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder))
        with convserve(Path(folder)) as server:
            assert server.http_port is not None
            client = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)

            def feed(data: bytes) -> bool:
                method, path, headers, body = json.loads(data)
                client.request(method, path, bytes.fromhex(body), headers)
                response = client.getresponse()
                response.read()
                if response.status >= 500 and response.status not in (503, 504):
                    raise WrongStatus(f"status {response.status} of {method} {path}")
                return response.status == 200

            try:
                yield feed
            finally:
                client.close()


TARGETS = (
    Target("json-bodies", make_json, parser(parse_json, InvalidInput), 0.1),
    Target(
        "json-numbers", make_numbers, parser(parse_numbers, InvalidInput, msgspec.DecodeError), 0.05
    ),
    Target("json-files", make_files, parser(parse_files, InvalidInput, msgspec.DecodeError), 0.03),
    Target(
        "base64",
        make_base64,
        parser(lambda data: decode_base64(data.decode("latin-1")), NotBase64),
        0.04,
    ),
    Target("forms", make_form, parser(parse_whole_form, InvalidInput), 0.05),
    Target(
        "compressed", make_compressed, parser(decompress, DecompressionError, TooLargeError), 0.03
    ),
    Target(
        "http1-bytes", make_http1, parser(parse_http1, h11.RemoteProtocolError, Incomplete), 0.05
    ),
    Target("http-requests", make_request, requests, 0.01),
)
