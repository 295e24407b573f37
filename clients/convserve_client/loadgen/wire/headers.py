"""Headers of gRPC calls: those of requests, and what a caller needs of a response's."""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

USER_AGENT = b"convserve-bench"

# Limits of the cache of response headers, for each connection.
MAX_CACHED_HEADS = 1024
MAX_CACHED_HEAD_BYTES = 1024

MAX_TIMEOUT_DIGITS = 8  # (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)
UNITS = (("u", 1e6), ("m", 1e3), ("S", 1.0), ("H", 1 / 3600))

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Headers or trailers of a response."""

    status: str = ""  # of HTTP
    content_type: str = ""
    grpc_status: str | None = None
    is_grpc: bool = False  # whether these are the headers of a gRPC response
    is_ok: bool = False  # whether gRPC's status is a success
    fields: tuple[Header, ...] = ()  # without HTTP/2's pseudo-headers, as sent

    @property
    def message(self) -> str:
        """The text of gRPC's status."""
        return unquote(dict(self.fields).get(b"grpc-message", b"").decode("ascii", "replace"))

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The fields as text. Fields whose name ends in -bin are decoded to bytes."""
        return [
            (name.decode("ascii", "replace"), value)
            for name, sent in self.fields
            for value in _values(name, sent)
        ]


class ResponseHeads:
    """Reads the headers of one connection's responses. Repeated headers are read once."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Header, ...], ResponseHead] = {}
        self.latest_headers: tuple[Header, ...] | None = None  # comparing is cheaper than a hash
        self.latest = ResponseHead()

    def read(self, headers: tuple[Header, ...]) -> ResponseHead:
        head = self._cache.get(headers)
        if head is None:
            head = _response_head(headers)
            if sum(len(name) + len(value) for name, value in headers) > MAX_CACHED_HEAD_BYTES:
                return head
            if len(self._cache) >= MAX_CACHED_HEADS:
                self._cache.clear()
            self._cache[headers] = head
        self.latest_headers, self.latest = headers, head
        return head


def request_headers(
    path: str, authority: str, timeout_s: float, *, scheme: str, metadata: Sequence[Header] = ()
) -> tuple[Header, ...]:
    """Headers of a request, in the order that gRPC prescribes."""
    return (
        (b":method", b"POST"),
        (b":scheme", scheme.encode("ascii")),
        (b":path", path.encode("ascii")),
        (b":authority", authority.encode("ascii")),
        (b"te", b"trailers"),
        (b"grpc-timeout", timeout(timeout_s).encode("ascii")),
        (b"content-type", b"application/grpc"),
        (b"user-agent", USER_AGENT),
        *metadata,
    )


def timeout(seconds: float) -> str:
    """A `grpc-timeout`, rounded up."""
    for unit, per_second in UNITS:
        number = max(0, math.ceil(seconds * per_second))
        if number < 10**MAX_TIMEOUT_DIGITS:
            return f"{number}{unit}"
    raise ValueError(f"{seconds} s is too long for a grpc-timeout")


def _response_head(headers: tuple[Header, ...]) -> ResponseHead:
    found = {name: value.decode("ascii", "replace") for name, value in headers}
    status, content_type = found.get(b":status", ""), found.get(b"content-type", "")
    grpc_status = found.get(b"grpc-status")
    return ResponseHead(
        status=status,
        content_type=content_type,
        grpc_status=grpc_status,
        is_grpc=status == "200" and content_type.startswith("application/grpc"),
        is_ok=grpc_status == "0",
        fields=tuple(header for header in headers if header[0] != b":status"),
    )


def _values(name: bytes, sent: bytes) -> list[str | bytes]:
    """Values of a field. Several -bin values may be joined by commas."""
    if not name.endswith(b"-bin"):
        return [sent.decode("ascii", "replace")]
    try:
        return [
            b64decode(value + b"=" * (-len(value) % 4), validate=True)
            for value in sent.replace(b" ", b"").split(b",")
        ]
    except binascii.Error:
        return [sent]
