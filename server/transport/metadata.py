"""Header blocks: reads those of requests, writes those of responses.

The library hpack decodes HPACK (RFC 7541). Most requests on a connection send the same block byte
for byte, because their headers are in the connection's table. Such a block is decoded once.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpack import Decoder
from hpack.table import HeaderTable

# A call with larger headers is refused. Their size is the text, and 32 bytes for each header, as
# HTTP/2 counts it.
MAX_HEADERS_BYTES = 8 << 10
MAX_HEADER_BLOCK_BYTES = 32 << 10  # as sent; a larger block ends the connection
HEADER_OVERHEAD_BYTES = 32

# Per connection. The bound matters where a header differs in each request.
CACHED_BLOCKS = 128
CACHED_BLOCK_BYTES = 1024

TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")  # github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md
UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

SET_TABLE_SIZE = 0x20  # prefix of a table size update: such a block changes the decoder's state

PSEUDO = {b":method", b":scheme", b":path", b":authority"}
# HTTP/1.1's connection headers are not allowed in HTTP/2 (RFC 9113, 8.2.2).
CONNECTION_HEADERS = {
    *(b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"),
}

Trailer = tuple[str, str | bytes]


class HeaderError(Exception):
    """A header block that can't be decoded. Later blocks of the connection can't be either."""


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The headers of a request. Text is empty for headers that are absent."""

    method: str
    path: str
    content_type: str
    encoding: str
    timeout: str
    timeout_s: float | None  # None if `timeout` is absent or invalid
    fields: tuple[tuple[bytes, bytes], ...]  # all but pseudo-headers, as they were sent
    malformed: bool  # breaks a rule of RFC 9113, 8.2 or 8.3
    size: int  # bytes, as HTTP/2 counts them

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The fields as text; values of -bin fields as decoded bytes."""
        return [_metadatum(name, value) for name, value in self.fields]


class HeaderReader:
    """Reads the header blocks of one connection, in the order of arrival."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_HEADER_BLOCK_BYTES)
        self._cache: dict[bytes, RequestHead] = {}

    def read(self, block: bytes) -> RequestHead:
        """Raises HeaderError."""
        return self._cache.get(block) or self._read(block)

    def _read(self, block: bytes) -> RequestHead:
        if len(block) > 8 and all(byte & 0xE0 == SET_TABLE_SIZE for byte in block[:8]):
            raise HeaderError("more than two table size updates")
        table = self._decoder.header_table
        before, latest = _sizes(table), _latest(table)
        try:
            head = _head(self._decoder.decode(block, raw=True))
        except Exception as error:  # hpack raises several kinds for a truncated block
            raise HeaderError(f"{type(error).__name__}: {error}") from error
        if _sizes(table) != before or _latest(table) is not latest:
            self._cache.clear()  # the same bytes may now mean something else
        elif 0 < len(block) <= CACHED_BLOCK_BYTES and block[0] & 0xE0 != SET_TABLE_SIZE:
            if len(self._cache) >= CACHED_BLOCKS:
                self._cache.clear()
            self._cache[block] = head
        return head


def block(fields: Iterable[tuple[str, str | bytes]], status: int = 200) -> bytes:
    """The header block at the start of a response. It uses no table, and so no state."""
    first = b"\x88" if status == 200 else b"\x08" + _text(b"%d" % status)
    return first + b"".join(_literal(name, value) for name, value in fields)


def trailer_block(code: int, message: str = "", trailers: Sequence[Trailer] = ()) -> bytes:
    """The trailer block of a call: status, message for the client, further trailers."""
    fields: list[Trailer] = [("grpc-status", str(code))]
    if message:
        fields.append(("grpc-message", _percent_encoded(message)))
    return b"".join(_literal(name, value) for name, value in (*fields, *trailers))


def _sizes(table: HeaderTable) -> tuple[int, int]:
    return table.maxsize, len(table.dynamic_entries)


def _latest(table: HeaderTable) -> tuple[bytes, bytes] | None:
    return table.dynamic_entries[0] if table.dynamic_entries else None


def _head(fields: Iterable[tuple[bytes, bytes]]) -> RequestHead:
    own: dict[bytes, bytes] = {}
    others: list[tuple[bytes, bytes]] = []
    malformed, size = False, 0
    for name, value in fields:
        size += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        if name[:1] == b":":
            malformed |= name in own or name not in PSEUDO or bool(others)
            own[name] = value
        else:
            malformed |= name != name.lower() or name in CONNECTION_HEADERS or not name
            malformed |= name == b"te" and value != b"trailers"
            others.append((bytes(name), bytes(value)))
    found = dict(others)
    timeout = _ascii(found.get(b"grpc-timeout", b""))
    return RequestHead(
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
    """Seconds of a `grpc-timeout` header; None if it is invalid."""
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
    """A header without indexing (RFC 7541, 6.2.2); bytes are sent as base64."""
    text = b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")
    return b"\0" + _text(name.encode("ascii")) + _text(text)


def _text(value: bytes) -> bytes:
    return _length(len(value)) + value


def _length(length: int) -> bytes:
    """An integer with a 7-bit prefix (RFC 7541, 5.1)."""
    if length < 127:
        return bytes((length,))
    encoded, length = bytearray(b"\x7f"), length - 127
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def _percent_encoded(message: str) -> str:
    """Percent-encodes a message as gRPC requires: all but printable ASCII, and %."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in message.encode("utf-8", "replace")
    )
