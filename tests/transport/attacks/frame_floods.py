"""Floods of HTTP/2 frames: what a hostile client sends, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from tests.support.http2_peers import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    headers,
    message,
)

PIECE_FRAMES = 500  # frames in one piece, so that Python sends them fast
UNKNOWN = 0xBB  # a frame type that no RFC defines
INITIAL_WINDOW_SIZE = 4

CALL = headers(path="/convserve.v1.Classifier/Classify")
BODY = message(b"")

Flood = Callable[[], Iterator[bytes]]


def rapid_reset() -> Iterator[bytes]:
    """Requests that are cancelled at once (CVE-2023-44487)."""
    reset = CANCEL.to_bytes(4, "big")
    return _streams(
        lambda stream: (
            frame(HEADERS, END_HEADERS, stream, CALL) + frame(RST_STREAM, 0, stream, reset)
        )
    )


def rapid_reset_of_whole_calls() -> Iterator[bytes]:
    reset = CANCEL.to_bytes(4, "big")
    return _streams(lambda stream: _call(stream) + frame(RST_STREAM, 0, stream, reset))


def made_you_reset() -> Iterator[bytes]:
    """Requests with an error that the server must reset (CVE-2025-8671)."""
    return _streams(lambda stream: _call(stream) + frame(WINDOW_UPDATE, 0, stream, bytes(4)))


def pings() -> Iterator[bytes]:
    return _repeated(frame(PING, 0, 0, bytes(8)))


def settings() -> Iterator[bytes]:
    return _repeated(frame(SETTINGS))


def empty_data() -> Iterator[bytes]:
    return _on_one_stream(frame(DATA, 0, 1))


def one_byte_data() -> Iterator[bytes]:
    """The bytes of one long message, each in a frame."""
    yield frame(HEADERS, END_HEADERS, 1, CALL)
    yield frame(DATA, 0, 1, b"\0" + (60_000).to_bytes(4, "big"))
    yield frame(DATA, 0, 1, b"\0") * 59_999
    while True:
        yield frame(DATA, 0, 1) * PIECE_FRAMES


def window_updates() -> Iterator[bytes]:
    return _repeated(frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"))


def priorities() -> Iterator[bytes]:
    return _repeated(frame(PRIORITY, 0, 1, bytes(4) + b"\x10"))


def unknown_frames() -> Iterator[bytes]:
    return _repeated(frame(UNKNOWN))


def tiny_literals() -> Iterator[bytes]:
    """Header blocks of 390 fields, each a literal of two bytes."""
    block = CALL + b"\x00\x01a\x00" * 370
    return _streams(lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


def too_many_literals() -> Iterator[bytes]:
    """Header blocks of 890 fields."""
    block = CALL + b"\x00\x01a\x00" * 890
    return _streams(lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


def indexed_fields() -> Iterator[bytes]:
    """Header blocks of 370 fields, each an index of one byte."""
    block = CALL + b"\x90" * 370  # 16: accept-encoding
    return _streams(lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


def huffman_codes() -> Iterator[bytes]:
    """Header blocks with a value of 15,000 bytes of Huffman code."""
    code = b"\x00" * 10_000  # the code of "0" is 00000
    block = CALL + b"\x00\x01a\xff" + _varint(len(code) - 127) + code
    return _streams(lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, block))


def zero_window() -> Iterator[bytes]:
    """Calls whose responses the client never lets through."""
    yield frame(SETTINGS, 0, 0, INITIAL_WINDOW_SIZE.to_bytes(2, "big") + bytes(4))
    yield from _streams(_call)


def window_dribble() -> Iterator[bytes]:
    """Calls whose responses the client lets through byte by byte."""
    yield frame(SETTINGS, 0, 0, INITIAL_WINDOW_SIZE.to_bytes(2, "big") + bytes(4))
    streams = range(1, 200, 2)
    yield b"".join(_call(stream) for stream in streams)
    while True:
        yield b"".join(frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\1") for stream in streams)


FLOODS: tuple[Flood, ...] = (
    rapid_reset,
    rapid_reset_of_whole_calls,
    made_you_reset,
    pings,
    settings,
    empty_data,
    one_byte_data,
    window_updates,
    priorities,
    unknown_frames,
    tiny_literals,
    too_many_literals,
    indexed_fields,
    huffman_codes,
    zero_window,
    window_dribble,
)


def _call(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, CALL) + frame(DATA, END_STREAM, stream, BODY)


def _repeated(one: bytes) -> Iterator[bytes]:
    while True:
        yield one * PIECE_FRAMES


def _on_one_stream(one: bytes) -> Iterator[bytes]:
    yield frame(HEADERS, END_HEADERS, 1, CALL)
    yield from _repeated(one)


def _streams(frames: Callable[[int], bytes]) -> Iterator[bytes]:
    """The frames of 10,000 streams, and after that no more."""
    numbers = count(1, 2)
    for _ in range(200):
        yield b"".join(frames(next(numbers)) for _ in range(50))


def _varint(value: int) -> bytes:
    """What follows the first byte of an integer in a header block (RFC 7541, 5.1)."""
    low = bytearray()
    while value >= 128:
        low.append(value % 128 + 128)
        value //= 128
    return bytes((*low, value))
