"""Header blocks: what a request's says of its call, and those of responses.

HPACK (RFC 7541) is the library's. Most requests of a connection have the same block, byte for byte,
as their headers lie in the connection's table: those are read once.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpack import Decoder
from hpack.table import HeaderTable

# As HTTP/2 counts them: the text, and 32 bytes a header. Callers are told of the first limit, and
# a call beyond it is refused; at the second one reading ends, and the connection with it.
HEADERS_BYTES = 8 << 10
MOST_HEADERS_BYTES = 32 << 10
HEADER_BYTES = 32

# Of a connection: where a header never repeats, keeping blocks is for nothing.
KEPT_BLOCKS = 128
KEPT_BLOCK_BYTES = 1024

TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")  # github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md
UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

SET_TABLE_SIZE = 0x20  # a block that begins so has an effect each time it is read

PSEUDO = {b":method", b":scheme", b":path", b":authority"}
# What HTTP/1.1 says of a connection has no place in HTTP/2 (RFC 9113, 8.2.2).
OF_CONNECTIONS = {
    *(b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"),
}

Trailer = tuple[str, str | bytes]


class Unreadable(Exception):
    """A block that makes no sense; the next ones can't be read either, as they build on it."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a request's headers say; empty where they say nothing."""

    method: str
    path: str
    content_type: str
    encoding: str
    timeout: str
    timeout_s: float | None  # None where `timeout` says no time
    fields: tuple[tuple[bytes, bytes], ...]  # those that are not HTTP's own, as they were sent
    malformed: bool  # by HTTP's rules
    size: int  # in bytes, as HTTP/2 counts

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The fields as text, and those whose name ends in -bin as the bytes they stand for."""
        return [_metadatum(name, value) for name, value in self.fields]


class Heads:
    """Reads the header blocks of one connection, in the order in which they came."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MOST_HEADERS_BYTES)
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """Raises Unreadable."""
        return self._known.get(block) or self._read(block)

    def _read(self, block: bytes) -> Head:
        if len(block) > 8 and all(byte & 0xE0 == SET_TABLE_SIZE for byte in block[:8]):
            raise Unreadable(
                "the table's size is set over and over"
            )  # two are all there is use for
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


def block(fields: Iterable[tuple[str, str | bytes]], status: int = 200) -> bytes:
    """The header block of a response that begins. It uses no table, and so no state."""
    first = b"\x88" if status == 200 else b"\x08" + _text(b"%d" % status)
    return first + b"".join(_literal(name, value) for name, value in fields)


def trailer_block(code: int, message: str = "", trailers: Sequence[Trailer] = ()) -> bytes:
    """What ends a call: gRPC's status, its message for the caller, and what details there are."""
    fields: list[Trailer] = [("grpc-status", str(code))]
    if message:
        fields.append(("grpc-message", _percent_encoded(message)))
    return b"".join(_literal(name, value) for name, value in (*fields, *trailers))


def _sizes(table: HeaderTable) -> tuple[int, int]:
    return table.maxsize, len(table.dynamic_entries)


def _latest(table: HeaderTable) -> tuple[bytes, bytes] | None:
    return table.dynamic_entries[0] if table.dynamic_entries else None


def _head(fields: Iterable[tuple[bytes, bytes]]) -> Head:
    own: dict[bytes, bytes] = {}
    others: list[tuple[bytes, bytes]] = []
    malformed, size = False, 0
    for name, value in fields:
        size += len(name) + len(value) + HEADER_BYTES
        if name[:1] == b":":
            malformed |= name in own or name not in PSEUDO or bool(others)
            own[name] = value
        else:
            malformed |= name != name.lower() or name in OF_CONNECTIONS or not name
            malformed |= name == b"te" and value != b"trailers"
            others.append((bytes(name), bytes(value)))
    found = dict(others)
    timeout = _ascii(found.get(b"grpc-timeout", b""))
    return Head(
        method=_ascii(own.get(b":method", b"")),
        path=_ascii(own.get(b":path", b"")),
        content_type=_ascii(found.get(b"content-type", b"")),
        encoding=_ascii(found.get(b"grpc-encoding", b"")),
        timeout=timeout,
        timeout_s=timeout_s(timeout),
        fields=tuple(others),
        malformed=malformed or not {b":method", b":scheme", b":path"} <= own.keys(),
        size=size,
    )


def timeout_s(text: str) -> float | None:
    """Seconds of a `grpc-timeout`; None where it is none."""
    found = TIMEOUT.fullmatch(text)
    return None if found is None else int(found[1]) * UNIT_S[found[2]]


def _metadatum(name: bytes, value: bytes) -> tuple[str, str | bytes]:
    if not name.endswith(b"-bin"):
        return _ascii(name), _ascii(value)
    try:
        return _ascii(name), b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        return _ascii(name), value


def _ascii(value: bytes) -> str:
    return value.decode("ascii", "backslashreplace")


def _literal(name: str, value: str | bytes) -> bytes:
    """A header that no table is to keep; bytes travel as base64."""
    text = b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")
    return b"\0" + _text(name.encode("ascii")) + _text(text)


def _text(value: bytes) -> bytes:
    return _length(len(value)) + value


def _length(length: int) -> bytes:
    """An integer with a prefix of seven bits (RFC 7541, 5.1)."""
    if length < 127:
        return bytes((length,))
    encoded, length = bytearray(b"\x7f"), length - 127
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def _percent_encoded(message: str) -> str:
    """As gRPC wants a message: printable ASCII but for %, which begins the code of all others."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in message.encode("utf-8", "replace")
    )
