"""Header blocks of gRPC's calls: a request's is made once, a response's is read.

HPACK (RFC 7541) is the library's. Most responses of a connection have the same blocks, byte for
byte, as their headers lie in the connection's table: those are read once.
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
MOST_HEADERS_BYTES = 64 << 10  # of a response, as HTTP/2 counts; reading ends there

# Of a connection: where a header never repeats, keeping blocks is for nothing.
KEPT_BLOCKS = 1024
KEPT_BLOCK_BYTES = 1024

SET_TABLE_SIZE = 0x20  # a block that begins so has an effect each time it is read

# Fields of HPACK's static table (RFC 7541, appendix A): whole ones, and names of literals.
POST, HTTP = b"\x83", b"\x86"
AUTHORITY, PATH, CONTENT_TYPE, USER = b"\x01", b"\x04", b"\x0f\x10", b"\x0f\x2b"
NEW_NAME = b"\0"

# What HTTP/1.1 says of a connection has no place in HTTP/2 (RFC 9113, 8.2.2).
OF_CONNECTIONS = {
    *(b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"),
}

DIGITS = 8  # of a grpc-timeout, at most (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)
UNITS = (("u", 1e6), ("m", 1e3), ("S", 1.0), ("H", 1 / 3600))


class Unreadable(Exception):
    """A block that makes no sense; the next ones can't be read either, as they build on it."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a response's headers, or its trailers, say."""

    status: str = ""  # HTTP's
    content_type: str = ""
    grpc_status: str | None = None
    fields: tuple[tuple[bytes, bytes], ...] = ()  # those that are not HTTP's own, as they were sent
    malformed: bool = False  # by HTTP's rules

    @property
    def is_grpc(self) -> bool:
        return self.status == "200" and self.content_type.startswith("application/grpc")

    @property
    def message(self) -> str:
        """gRPC's, for people."""
        return unquote(dict(self.fields).get(b"grpc-message", b"").decode("ascii", "replace"))

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The fields as text, and those whose name ends in -bin as the bytes they stand for."""
        return [
            (name.decode("ascii", "replace"), value)
            for name, sent in self.fields
            for value in _values(name, sent)
        ]


class Heads:
    """Reads the header blocks of one connection, in the order in which they came."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MOST_HEADERS_BYTES)
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """Raises Unreadable."""
        return self._known.get(block) or self._read(block)

    def _read(self, block: bytes) -> Head:
        table = self._decoder.header_table
        before, latest = _sizes(table), _latest(table)
        try:
            head = _head(self._decoder.decode(block, raw=True))
        except Exception as error:  # whatever the library makes of a block that ends too early
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if _sizes(table) != before or _latest(table) is not latest:
            self._known.clear()  # the same bytes may mean something else now
        elif 0 < len(block) <= KEPT_BLOCK_BYTES and block[0] & 0xE0 != SET_TABLE_SIZE:
            if len(self._known) >= KEPT_BLOCKS:
                self._known.clear()
            self._known[block] = head
        return head


def request_block(path: str, authority: str, timeout_s: float) -> bytes:
    """The header block of a call's request. It uses no table, and so no state."""
    return b"".join(
        [
            *(POST, HTTP, PATH, _text(path), AUTHORITY, _text(authority)),
            *(NEW_NAME, _text("te"), _text("trailers")),
            *(NEW_NAME, _text("grpc-timeout"), _text(timeout(timeout_s))),
            *(CONTENT_TYPE, _text("application/grpc"), USER, _text(USER_AGENT)),
        ]
    )


def timeout(seconds: float) -> str:
    """A `grpc-timeout`, never shorter than that."""
    for unit, per_second in UNITS:
        number = max(0, math.ceil(seconds * per_second))
        if number < 10**DIGITS:
            return f"{number}{unit}"
    raise ValueError(f"{seconds} s is longer than gRPC can say")


def _sizes(table: HeaderTable) -> tuple[int, int]:
    return table.maxsize, len(table.dynamic_entries)


def _latest(table: HeaderTable) -> tuple[bytes, bytes] | None:
    return table.dynamic_entries[0] if table.dynamic_entries else None


def _head(sent: Iterable[tuple[bytes, bytes]]) -> Head:
    fields: list[tuple[bytes, bytes]] = []
    status, malformed = b"", False
    for name, value in sent:
        if name[:1] == b":":
            malformed |= name != b":status" or bool(fields) or bool(status)
            status = bytes(value)
        else:
            malformed |= name != name.lower() or name in OF_CONNECTIONS or not name
            fields.append((bytes(name), bytes(value)))
    found = dict(fields)
    grpc_status = found.get(b"grpc-status")
    return Head(
        status=status.decode("ascii", "replace"),
        content_type=found.get(b"content-type", b"").decode("ascii", "replace"),
        grpc_status=None if grpc_status is None else grpc_status.decode("ascii", "replace"),
        fields=tuple(fields),
        malformed=malformed,
    )


def _values(name: bytes, sent: bytes) -> list[str | bytes]:
    """Several where they were joined."""
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
    """A string without Huffman's code (RFC 7541, 5.2)."""
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
