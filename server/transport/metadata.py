"""Headers of requests, headers and trailers of responses."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.transport.compression import WINDOW_BITS

# A call with larger or more headers is refused. Their size is the text, and 32 bytes for each
# header, as HTTP/2 counts it.
MAX_HEADERS_BYTES = 8 << 10
MAX_HEADER_FIELDS = 100
HEADER_OVERHEAD_BYTES = 32

GRPC = re.compile(r"application/grpc([+;]|$)")  # does not match application/grpc-web
ENCODINGS = ("identity", *WINDOW_BITS)

TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")  # github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md
UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

ESSENTIAL = (b":status", b"content-type", b"grpc-status")  # headers that a client cannot miss
CUT_ESCAPE = re.compile(rb"%.?$")  # the start of a percent-encoded byte

Header = tuple[bytes, bytes]
Trailer = tuple[str, str | bytes]


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The headers of a request. Text is empty for headers that are absent."""

    method: str
    path: str
    content_type: str
    encoding: str
    timeout: str
    timeout_s: float | None  # None if `timeout` is absent or invalid
    fields: tuple[Header, ...]  # all but pseudo-headers, as they were sent
    size: int  # bytes, as HTTP/2 counts them
    is_call: bool  # of gRPC; another request gets an HTTP status
    is_valid: bool  # nothing in the headers makes the call impossible

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The fields as text; values of -bin fields as decoded bytes."""
        return [_metadatum(name, value) for name, value in self.fields]


def size_of(headers: Iterable[Header]) -> int:
    """Bytes of headers, as HTTP/2 counts them."""
    return sum(len(name) + len(value) + HEADER_OVERHEAD_BYTES for name, value in headers)


def is_large(headers: tuple[Header, ...]) -> bool:
    """Whether headers of a request exceed a limit in number or size."""
    return len(headers) > MAX_HEADER_FIELDS or size_of(headers) > MAX_HEADERS_BYTES


def fitted(headers: tuple[Header, ...], limit_bytes: int) -> tuple[Header, ...]:
    """Headers of a response, within the bytes that the client takes.

    If they have more, the status stays, and as much of the message as fits.
    """
    if size_of(headers) <= limit_bytes:
        return headers
    kept = tuple(header for header in headers if header[0] in ESSENTIAL)
    message = dict(headers).get(b"grpc-message", b"")
    room = limit_bytes - size_of((*kept, (b"grpc-message", b"")))
    message = CUT_ESCAPE.sub(b"", message[: max(room, 0)])
    return (*kept, (b"grpc-message", message)) if message else kept


def response_head(content_type: str, status: int = 200) -> tuple[Header, ...]:
    """The headers at the start of a response."""
    return (b":status", b"%d" % status), (b"content-type", content_type.encode("ascii"))


def trailers(code: int, message: str = "", extra: Sequence[Trailer] = ()) -> tuple[Header, ...]:
    """The trailers of a call: status, message for the client, further trailers."""
    fields: list[Trailer] = [("grpc-status", str(code))]
    if message:
        fields.append(("grpc-message", _percent_encoded(message)))
    return metadata_headers((*fields, *extra))


def metadata_headers(fields: Sequence[Trailer]) -> tuple[Header, ...]:
    """Metadata as headers; values that are bytes as base64."""
    return tuple((name.encode("ascii"), _value(value)) for name, value in fields)


def timeout_s(text: str) -> float | None:
    """Seconds of a `grpc-timeout` header; None if it is invalid."""
    found = TIMEOUT.fullmatch(text)
    return None if found is None else int(found[1]) * UNIT_S[found[2]]


def request_head(headers: Iterable[Header]) -> RequestHead:
    """Reads the headers of a request."""
    known: dict[bytes, bytes] = {}
    fields: list[Header] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        known[name] = value
        if name[:1] != b":":
            fields.append((name, value))
    method = _ascii(known.get(b":method", b""))
    content_type = _ascii(known.get(b"content-type", b""))
    encoding = _ascii(known.get(b"grpc-encoding", b""))
    timeout = _ascii(known.get(b"grpc-timeout", b""))
    seconds = timeout_s(timeout)
    is_call = method == "POST" and GRPC.match(content_type) is not None
    is_valid = (
        is_call
        and size <= MAX_HEADERS_BYTES
        and len(fields) <= MAX_HEADER_FIELDS
        and (not encoding or encoding in ENCODINGS)
        and (not timeout or seconds is not None)
    )
    return RequestHead(
        method=method,
        path=_ascii(known.get(b":path", b"")),
        content_type=content_type,
        encoding=encoding,
        timeout=timeout,
        timeout_s=seconds,
        fields=tuple(fields),
        size=size,
        is_call=is_call,
        is_valid=is_valid,
    )


def _metadatum(name: bytes, value: bytes) -> tuple[str, str | bytes]:
    if not name.endswith(b"-bin"):
        return _ascii(name), _ascii(value)
    try:
        return _ascii(name), b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return _ascii(name), value


def _ascii(value: bytes) -> str:
    return value.decode("ascii", "backslashreplace")


def _value(value: str | bytes) -> bytes:
    """A trailer's value; bytes are sent as base64."""
    return b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")


def _percent_encoded(message: str) -> str:
    """Percent-encodes a message as gRPC requires: all but printable ASCII, and %."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in message.encode("utf-8", "replace")
    )
