"""HTTP/2 frames and header blocks, written by hand (RFC 9113, RFC 7541), valid or not.

Needs the standard library only, so that a client process starts fast.
"""

from __future__ import annotations

from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Frame types and flags (RFC 9113, 6)
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
UNKNOWN = 0xBB  # a frame type that no RFC defines
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

# Error codes (RFC 9113, 7)
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM = 4, 5, 6, 7
CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = 8, 9, 10, 11

# Settings (RFC 9113, 6.5.2)
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS = 1, 2, 3
INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = 4, 5, 6

Fields = Iterable[tuple[bytes, bytes]]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def settings(*pairs: tuple[int, int]) -> bytes:
    payload = b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in pairs)
    return frame(SETTINGS, payload=payload)


def window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def reset(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


MAX_WINDOW = 2**31 - 1
HELLO = PREFACE + settings()
# Windows that never hold a response back.
OPEN_WINDOWS = settings((INITIAL_WINDOW_SIZE, MAX_WINDOW)) + window_update(0, MAX_WINDOW - 65_535)


# --- header blocks -------------------------------------------------------------------------------


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """An integer after `bits` of its first byte, whose other bits are `first` (RFC 7541, 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    encoded = bytearray((first | limit,))
    value -= limit
    while value >= 128:
        encoded.append(value % 128 | 128)
        value //= 128
    return bytes((*encoded, value))


def text(value: bytes) -> bytes:
    return integer(len(value), 7) + value


def huffman_zeros(codes: int) -> bytes:
    """A string of Huffman codes of "0", which have five bits each; `codes` is a multiple of 8."""
    code = bytes(codes * 5 // 8)
    return integer(len(code), 7, 0x80) + code


def literal(name: bytes, value: bytes) -> bytes:
    """A field that does not enter the table of the connection (RFC 7541, 6.2.2)."""
    return b"\0" + text(name) + text(value)


def indexed_literal(name: bytes, value: bytes) -> bytes:
    """A field that enters the table of the connection (RFC 7541, 6.2.1)."""
    return b"\x40" + text(name) + text(value)


def indexed(index: int) -> bytes:
    return integer(index, 7, 0x80)


def table_size(size: int) -> bytes:
    return integer(size, 5, 0x20)


def block(fields: Fields) -> bytes:
    """A header block without references to the table."""
    return b"".join(literal(name, value) for name, value in fields)


def request_fields(path: str) -> list[tuple[bytes, bytes]]:
    """The headers of a gRPC call."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"here"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]


def request_block(path: str, *more: tuple[bytes, bytes]) -> bytes:
    return block((*request_fields(path), *more))


# --- gRPC ----------------------------------------------------------------------------------------


def message(data: bytes, compressed: int = 0) -> bytes:
    return bytes((compressed,)) + len(data).to_bytes(4, "big") + data


def call(stream: int, path: str, data: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    """The frames of a whole unary call. The message fits into one frame."""
    return frame(HEADERS, END_HEADERS, stream, request_block(path, *more)) + frame(
        DATA, END_STREAM, stream, message(data)
    )


# --- protobuf ------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value % 128 | 128)
        value //= 128
    return bytes((*encoded, value))


def submessage(field: int, data: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(field << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def classify_pixels(model: bytes, height: int, width: int, channels: int) -> bytes:
    """A ClassifyRequest with one black image."""
    sizes = number(1, 1) + number(2, height) + number(3, width) + number(4, channels)
    data = submessage(5, bytes(height * width * channels))
    return submessage(1, model) + submessage(4, sizes + data)
