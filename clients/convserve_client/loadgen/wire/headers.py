"""Header blocks of gRPC calls: encodes those of requests and decodes those of responses.

The library hpack decodes HPACK (RFC 7541). Most responses of a connection have identical header
blocks, because their headers are in the connection's table. Such a block is decoded only once.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from hpack import Decoder
from hpack.table import HeaderTable

USER_AGENT = "convserve-bench"
MAX_HEADERS_BYTES = 64 << 10  # of a response, as HTTP/2 counts them

# Limits of the cache of decoded blocks, for each connection.
MAX_CACHED_BLOCKS = 1024
MAX_CACHED_BLOCK_BYTES = 1024

TABLE_SIZE_UPDATE = 0x20  # a block that starts with it changes the table each time

# Entries of HPACK's static table (RFC 7541, appendix A): whole fields, then names of literals.
POST, HTTP = b"\x83", b"\x86"
AUTHORITY, PATH, CONTENT_TYPE, USER = b"\x01", b"\x04", b"\x0f\x10", b"\x0f\x2b"
NEW_NAME = b"\0"

# HTTP/2 forbids the connection headers of HTTP/1.1 (RFC 9113, 8.2.2).
CONNECTION_HEADERS = {
    *(b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"),
}

MAX_TIMEOUT_DIGITS = 8  # (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)
UNITS = (("u", 1e6), ("m", 1e3), ("S", 1.0), ("H", 1 / 3600))


class UndecodableHeaders(Exception):
    """The block is invalid. Later blocks depend on it, so they cannot be decoded either."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Headers or trailers of a response."""

    status: str = ""  # of HTTP
    content_type: str = ""
    grpc_status: str | None = None
    fields: tuple[tuple[bytes, bytes], ...] = ()  # without HTTP/2's pseudo-headers, as sent
    malformed: bool = False  # whether HTTP/2 forbids these headers

    @property
    def is_grpc(self) -> bool:
        return self.status == "200" and self.content_type.startswith("application/grpc")

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


class HeaderDecoder:
    """Decodes the header blocks of one connection, in the order in which they arrived."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_HEADERS_BYTES)
        self._cache: dict[bytes, ResponseHead] = {}

    def read(self, block: bytes) -> ResponseHead:
        """Raises UndecodableHeaders."""
        return self._cache.get(block) or self._decode(block)

    def _decode(self, block: bytes) -> ResponseHead:
        table = self._decoder.header_table
        before, latest = _sizes(table), _latest(table)
        try:
            head = _head(self._decoder.decode(block, raw=True))
        except Exception as error:  # the library raises various errors for a truncated block
            raise UndecodableHeaders(f"{type(error).__name__}: {error}") from error
        if _sizes(table) != before or _latest(table) is not latest:
            self._cache.clear()  # the table changed: the same bytes may mean something else now
        elif 0 < len(block) <= MAX_CACHED_BLOCK_BYTES and block[0] & 0xE0 != TABLE_SIZE_UPDATE:
            if len(self._cache) >= MAX_CACHED_BLOCKS:
                self._cache.clear()
            self._cache[block] = head
        return head


def request_block(path: str, authority: str, timeout_s: float) -> bytes:
    """Header block of a request. It uses no table, so it can be sent on any connection."""
    return b"".join(
        [
            *(POST, HTTP, PATH, _text(path), AUTHORITY, _text(authority)),
            *(NEW_NAME, _text("te"), _text("trailers")),
            *(NEW_NAME, _text("grpc-timeout"), _text(timeout(timeout_s))),
            *(CONTENT_TYPE, _text("application/grpc"), USER, _text(USER_AGENT)),
        ]
    )


def timeout(seconds: float) -> str:
    """A `grpc-timeout`, rounded up."""
    for unit, per_second in UNITS:
        number = max(0, math.ceil(seconds * per_second))
        if number < 10**MAX_TIMEOUT_DIGITS:
            return f"{number}{unit}"
    raise ValueError(f"{seconds} s is too long for a grpc-timeout")


def _sizes(table: HeaderTable) -> tuple[int, int]:
    return table.maxsize, len(table.dynamic_entries)


def _latest(table: HeaderTable) -> tuple[bytes, bytes] | None:
    return table.dynamic_entries[0] if table.dynamic_entries else None


def _head(sent: Iterable[tuple[bytes, bytes]]) -> ResponseHead:
    fields: list[tuple[bytes, bytes]] = []
    status, malformed = b"", False
    for name, value in sent:
        if name[:1] == b":":
            malformed |= name != b":status" or bool(fields) or bool(status)
            status = bytes(value)
        else:
            malformed |= name != name.lower() or name in CONNECTION_HEADERS or not name
            fields.append((bytes(name), bytes(value)))
    found = dict(fields)
    grpc_status = found.get(b"grpc-status")
    return ResponseHead(
        status=status.decode("ascii", "replace"),
        content_type=found.get(b"content-type", b"").decode("ascii", "replace"),
        grpc_status=None if grpc_status is None else grpc_status.decode("ascii", "replace"),
        fields=tuple(fields),
        malformed=malformed,
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


def _text(value: str) -> bytes:
    """A string literal without Huffman coding (RFC 7541, 5.2)."""
    encoded = value.encode("ascii")
    length, head = len(encoded), bytearray()
    if length < 127:
        head.append(length)
    else:
        head.append(127)
        length -= 127
        while length > 127:
            head.append(length & 127 | 128)
            length >>= 7
        head.append(length)
    return bytes(head) + encoded
