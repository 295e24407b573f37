"""Sections 3 to 5 and 7: the preface, frames, streams, errors, extensions."""

from __future__ import annotations

from tests.support.http2_frames import (
    CANCEL,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    HELLO,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    STREAM_CLOSED,
    UNKNOWN,
    WITH_PRIORITY,
    call,
    frame,
    message,
    request_block,
    reset,
    settings,
    window_update,
)
from tests.transport.conformance.case import (
    ECHO,
    NEVER,
    Case,
    Reaction,
    all_of,
    answers,
    connection_error,
    either,
    head,
    lives,
    stream_error,
)

PING_FRAME = frame(PING, 0, 0, bytes(8))
WHOLE = call(1, ECHO, b"word")
WAITING = call(1, NEVER)  # the server has the whole request and does not respond
CLOSED = (STREAM_CLOSED, PROTOCOL_ERROR)
TOO_LARGE = (256 << 10) + 1  # above the server's MAX_FRAME_SIZE


def starts_with_settings(seen: Reaction) -> bool:
    return seen.frames[0][0] == 4 and not seen.frames[0][1] and not seen.frames[0][2]


def acknowledges_settings(seen: Reaction) -> bool:
    return seen.has(4, flags=1)


def refuses_a_stream(seen: Reaction) -> bool:
    """More streams than the server's limit of 100 were opened."""
    codes = {seen.reset_code(stream) for stream in range(1, 400, 2)}
    return bool(codes & {REFUSED_STREAM, PROTOCOL_ERROR}) or seen.is_closed


def says_goaway(seen: Reaction) -> bool:
    return seen.is_closed and seen.has(GOAWAY)


def priority(stream: int, on: int) -> bytes:
    return frame(PRIORITY, 0, stream, on.to_bytes(4, "big") + b"\x10")


CASES = (
    Case("3.4", "the server's first frame is SETTINGS", b"", starts_with_settings),
    Case("3.4", "the server acknowledges SETTINGS", b"", acknowledges_settings),
    Case("3.4", "a wrong preface", b"", connection_error(PROTOCOL_ERROR), b"INVALID" * 4),
    Case(
        "3.4",
        "a preface without SETTINGS",
        b"",
        connection_error(PROTOCOL_ERROR),
        PREFACE + frame(PING, 0, 0, bytes(8)),
    ),
    Case("4.1", "a frame of unknown type", frame(UNKNOWN, 0, 0, bytes(8)), lives),
    Case("4.1", "undefined flags", frame(PING, 0x16, 0, bytes(8)), lives),
    Case(
        "4.1", "the reserved bit of a stream identifier", frame(PING, 0, 1 << 31, bytes(8)), lives
    ),
    Case(
        "4.2",
        "DATA of 16384 bytes",
        head() + frame(DATA, END_STREAM, 1, message(bytes(16_379))),
        answers,
    ),
    Case(
        "4.2",
        "DATA above the limit",
        head() + frame(DATA, END_STREAM, 1, bytes(TOO_LARGE)),
        stream_error(FRAME_SIZE_ERROR),
    ),
    Case(
        "4.2",
        "HEADERS above the limit",
        frame(HEADERS, END_HEADERS | END_STREAM, 1, bytes(TOO_LARGE)),
        connection_error(FRAME_SIZE_ERROR),
    ),
    Case(
        "4.2",
        "SETTINGS above the limit",
        frame(4, 0, 0, bytes(TOO_LARGE // 6 * 6 + 6)),
        connection_error(FRAME_SIZE_ERROR),
    ),
    Case(
        "4.3",
        "a block that cannot be decoded",
        frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x40"),
        connection_error(COMPRESSION_ERROR),
    ),
    Case(
        "4.3",
        "PRIORITY inside a block",
        frame(HEADERS, END_STREAM, 1, request_block(ECHO)) + priority(1, 0),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "4.3",
        "HEADERS of another stream inside a block",
        frame(HEADERS, END_STREAM, 1, request_block(ECHO)) + head(stream=3),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("5.1", "idle: DATA", frame(DATA, END_STREAM, 1, b"test"), connection_error(*CLOSED)),
    Case("5.1", "idle: RST_STREAM", reset(1), connection_error(PROTOCOL_ERROR)),
    Case("5.1", "idle: WINDOW_UPDATE", window_update(1, 100), connection_error(PROTOCOL_ERROR)),
    Case(
        "5.1",
        "idle: CONTINUATION",
        frame(CONTINUATION, END_HEADERS, 1, request_block(ECHO)),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("5.1", "idle: PRIORITY", priority(1, 0), lives),
    Case(
        "5.1",
        "half-closed (remote): DATA",
        WAITING + frame(DATA, END_STREAM, 1, b"test"),
        stream_error(STREAM_CLOSED),
    ),
    Case("5.1", "half-closed (remote): HEADERS", WAITING + head(), stream_error(STREAM_CLOSED)),
    Case(
        "5.1",
        "half-closed (remote): CONTINUATION",
        WAITING + frame(CONTINUATION, END_HEADERS, 1, request_block(ECHO)),
        stream_error(*CLOSED),
    ),
    Case("5.1", "half-closed (remote): WINDOW_UPDATE", WAITING + window_update(1, 1), lives),
    Case("5.1", "half-closed (remote): PRIORITY", WAITING + priority(1, 0), lives),
    Case("5.1", "half-closed (remote): RST_STREAM", WAITING + reset(1), lives),
    # Of a closed stream, a server MAY treat frames as an error.
    Case(
        "5.1",
        "reset: DATA",
        head() + reset(1) + frame(DATA, END_STREAM, 1, b"test"),
        either(lives, stream_error(*CLOSED)),
    ),
    Case("5.1", "reset: HEADERS", head() + reset(1) + head(), either(lives, stream_error(*CLOSED))),
    Case(
        "5.1",
        "reset: CONTINUATION",
        head() + reset(1) + frame(CONTINUATION, END_HEADERS, 1, request_block(ECHO)),
        stream_error(*CLOSED),
    ),
    Case(
        "5.1",
        "closed: DATA",
        WHOLE,
        either(answers, connection_error(*CLOSED)),
        then=frame(DATA, END_STREAM, 1, b"test"),
    ),
    Case(
        "5.1",
        "closed: HEADERS",
        WHOLE,
        either(answers, connection_error(*CLOSED)),
        then=head(flags=END_STREAM),
    ),
    Case(
        "5.1",
        "closed: CONTINUATION",
        WHOLE,
        connection_error(*CLOSED),
        then=frame(CONTINUATION, END_HEADERS, 1, request_block(ECHO)),
    ),
    Case("5.1", "closed: PRIORITY", WHOLE, answers, then=priority(1, 0)),
    Case("5.1", "closed: WINDOW_UPDATE", WHOLE, answers, then=window_update(1, 1)),
    Case("5.1", "closed: RST_STREAM", WHOLE, answers, then=reset(1)),
    Case("5.1.1", "an even identifier", call(2, ECHO), connection_error(PROTOCOL_ERROR)),
    Case(
        "5.1.1",
        "a lower identifier",
        call(5, NEVER) + call(3, ECHO),
        # The higher one has closed it, and frames of a closed stream may be ignored.
        all_of(either(lives, connection_error(*CLOSED)), lambda seen: not seen.has_answered(3)),
    ),
    Case(
        "5.1.2",
        "more streams than the limit",
        b"".join(call(stream, NEVER) for stream in range(1, 400, 2)),
        refuses_a_stream,
    ),
    # Priorities are deprecated: RFC 9113 lets a server ignore them.
    Case(
        "5.3.1",
        "HEADERS that depend on their own stream",
        frame(
            HEADERS,
            END_HEADERS | END_STREAM | WITH_PRIORITY,
            1,
            b"\0\0\0\1\x10" + request_block(ECHO),
        ),
        either(lives, stream_error(PROTOCOL_ERROR)),
    ),
    Case(
        "5.3.1",
        "PRIORITY that depends on its own stream",
        priority(3, 3),
        either(lives, stream_error(PROTOCOL_ERROR, stream=3)),
    ),
    Case("5.4.1", "GOAWAY comes before the end", frame(PING, 0, 3, bytes(8)), says_goaway),
    Case("5.5", "an unknown frame", frame(UNKNOWN, 0, 0, b"test") + WHOLE, answers),
    Case(
        "5.5",
        "an unknown frame inside a block",
        frame(HEADERS, END_STREAM, 1, request_block(ECHO)) + frame(UNKNOWN, 0, 1, b"test"),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("7", "RST_STREAM with an unknown code", head() + reset(1, 0xFF), lives),
    Case(
        "7",
        "GOAWAY with an unknown code",
        frame(GOAWAY, 0, 0, bytes(4) + b"\0\0\0\xff"),
        either(lives, lambda seen: seen.is_closed),
    ),
    Case(
        "5.4.2",
        "RST_STREAM ends one stream only",
        head() + reset(1, CANCEL) + call(3, ECHO),
        all_of(lives, lambda seen: seen.has_answered(3)),
    ),
    Case("3.4", "SETTINGS may follow the preface later", settings() + WHOLE, answers, HELLO),
)
