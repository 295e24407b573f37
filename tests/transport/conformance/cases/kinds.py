"""Section 6: each kind of frame."""

from __future__ import annotations

from tests.support.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_WINDOW,
    PADDED,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    call,
    frame,
    message,
    request_block,
    settings,
    window_update,
)
from tests.transport.conformance.case import (
    ECHO,
    NEVER,
    Case,
    Demand,
    Reaction,
    all_of,
    answers,
    connection_error,
    either,
    head,
    lives,
    stream_error,
)

BODY = message(b"word")
BLOCK = request_block(ECHO)
WHOLE = call(1, ECHO, b"word")


def padded(data: bytes, length: int) -> bytes:
    return bytes((length,)) + data + bytes(length)


def sends(size: int) -> Demand:
    """The server sends that many bytes of body on stream 1, and no more."""

    def demand(seen: Reaction) -> bool:
        return lives(seen) and size == sum(
            len(data) for kind, _, stream, data in seen.frames if kind == DATA and stream == 1
        )

    return demand


def answers_one_ping_of_case(seen: Reaction) -> bool:
    return any(
        kind == PING and flags & ACK and not any(data) for kind, flags, _, data in seen.frames
    )


def has_answer(seen: Reaction) -> bool:
    return seen.has_answered(1)


CASES = (
    Case("6.1", "one DATA frame", head() + frame(DATA, END_STREAM, 1, BODY), answers),
    Case(
        "6.1",
        "several DATA frames",
        head() + frame(DATA, 0, 1, BODY[:3]) + frame(DATA, END_STREAM, 1, BODY[3:]),
        answers,
    ),
    Case(
        "6.1",
        "padding",
        head() + frame(DATA, END_STREAM | PADDED, 1, padded(BODY, 6)),
        answers,
    ),
    Case("6.1", "stream 0", head() + frame(DATA, END_STREAM, 0, BODY), connection_error(1)),
    Case(
        "6.1",
        "a stream that the client has ended",
        call(1, NEVER) + frame(DATA, END_STREAM, 1, BODY),
        stream_error(STREAM_CLOSED),
    ),
    Case(
        "6.1",
        "padding longer than the frame",
        head() + frame(DATA, END_STREAM | PADDED, 1, b"\x06test"),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("6.2", "one HEADERS frame", WHOLE, answers),
    Case(
        "6.2",
        "padding",
        frame(HEADERS, END_HEADERS | PADDED, 1, padded(BLOCK, 6))
        + frame(DATA, END_STREAM, 1, BODY),
        answers,
    ),
    Case(
        "6.2",
        "priority",
        frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(4) + b"\xff" + BLOCK)
        + frame(DATA, END_STREAM, 1, BODY),
        answers,
    ),
    Case(
        "6.2",
        "trailers",
        head() + frame(DATA, 0, 1, BODY) + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\1a\1b"),
        answers,
    ),
    Case(
        "6.2",
        "stream 0",
        frame(HEADERS, END_HEADERS | END_STREAM, 0, BLOCK),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "6.2",
        "padding longer than the frame",
        frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"\xff" + BLOCK[:40]),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("6.3", "PRIORITY", frame(PRIORITY, 0, 1, bytes(4) + b"\xff") + WHOLE, answers),
    Case(
        "6.3",
        "stream 0",
        frame(PRIORITY, 0, 0, bytes(4) + b"\xff"),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "6.3",
        "a wrong length",
        call(1, NEVER) + frame(PRIORITY, 0, 1, bytes(4)),
        stream_error(FRAME_SIZE_ERROR),
    ),
    Case("6.4", "stream 0", frame(RST_STREAM, 0, 0, bytes(4)), connection_error(PROTOCOL_ERROR)),
    Case(
        "6.4",
        "a wrong length",
        head() + frame(RST_STREAM, 0, 1, bytes(3)),
        connection_error(FRAME_SIZE_ERROR),
    ),
    Case(
        "6.5",
        "an acknowledgement with payload",
        frame(SETTINGS, ACK, 0, bytes(6)),
        connection_error(FRAME_SIZE_ERROR),
    ),
    Case("6.5", "a stream", frame(SETTINGS, 0, 1), connection_error(PROTOCOL_ERROR)),
    Case("6.5", "a wrong length", frame(SETTINGS, 0, 0, b"\0\3\0"), connection_error(6)),
    Case("6.5.2", "push is 2", settings((ENABLE_PUSH, 2)), connection_error(PROTOCOL_ERROR)),
    Case(
        "6.5.2",
        "a window above the largest",
        settings((INITIAL_WINDOW_SIZE, 2**31)),
        connection_error(FLOW_CONTROL_ERROR),
    ),
    Case(
        "6.5.2",
        "frames below the smallest",
        settings((MAX_FRAME_SIZE, 16_383)),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "6.5.2",
        "frames above the largest",
        settings((MAX_FRAME_SIZE, 1 << 24)),
        connection_error(PROTOCOL_ERROR),
    ),
    Case("6.5.2", "an unknown setting", settings((0xFF, 1)) + WHOLE, answers),
    Case(
        "6.5.3",
        "the last of several values holds",
        settings((INITIAL_WINDOW_SIZE, 100), (INITIAL_WINDOW_SIZE, 1)) + WHOLE,
        sends(1),
    ),
    Case(
        "6.5.3",
        "every SETTINGS is acknowledged",
        settings() * 3,
        lambda seen: sum(kind == SETTINGS and flags == ACK for kind, flags, *_ in seen.frames) == 4,
    ),
    Case("6.7", "PING", frame(PING, 0, 0, bytes(8)), all_of(lives, answers_one_ping_of_case)),
    Case(
        "6.7",
        "an acknowledgement is not answered",
        frame(PING, ACK, 0, bytes(8)),
        lambda seen: lives(seen) and not answers_one_ping_of_case(seen),
    ),
    Case("6.7", "a stream", frame(PING, 0, 1, bytes(8)), connection_error(PROTOCOL_ERROR)),
    Case("6.7", "a wrong length", frame(PING, 0, 0, bytes(6)), connection_error(FRAME_SIZE_ERROR)),
    Case(
        "6.8",
        "GOAWAY",
        frame(GOAWAY, 0, 0, bytes(8)),
        either(lives, lambda seen: seen.is_closed),
    ),
    Case(
        "6.8", "GOAWAY does not end open calls", WHOLE + frame(GOAWAY, 0, 0, bytes(8)), has_answer
    ),
    Case("6.8", "a stream", frame(GOAWAY, 0, 1, bytes(8)), connection_error(PROTOCOL_ERROR)),
    Case("6.9", "WINDOW_UPDATE", window_update(0, 1) + head() + window_update(1, 1), lives),
    Case("6.9", "0 for the connection", window_update(0, 0), connection_error(PROTOCOL_ERROR)),
    Case("6.9", "0 for a stream", head() + window_update(1, 0), stream_error(PROTOCOL_ERROR)),
    Case(
        "6.9",
        "a wrong length",
        frame(WINDOW_UPDATE, 0, 0, bytes(3)),
        connection_error(FRAME_SIZE_ERROR),
    ),
    Case(
        "6.9.1", "no byte beyond the window", settings((INITIAL_WINDOW_SIZE, 1)) + WHOLE, sends(1)
    ),
    Case(
        "6.9.1",
        "the connection's window becomes too large",
        window_update(0, MAX_WINDOW) * 2,
        connection_error(FLOW_CONTROL_ERROR),
    ),
    Case(
        "6.9.1",
        "a stream's window becomes too large",
        call(1, NEVER) + window_update(1, MAX_WINDOW) * 2,
        stream_error(FLOW_CONTROL_ERROR),
    ),
    Case(
        "6.9.2",
        "a new initial window counts for open streams",
        settings((INITIAL_WINDOW_SIZE, 0)) + WHOLE + settings((INITIAL_WINDOW_SIZE, 1)),
        sends(1),
    ),
    Case(
        "6.9.2",
        "a window may become negative",
        settings((INITIAL_WINDOW_SIZE, 3))
        + WHOLE
        + settings((INITIAL_WINDOW_SIZE, 2))
        + window_update(1, 2),
        sends(4),
    ),
    Case(
        "6.9.2",
        "a new initial window is too large for an open stream",
        call(1, NEVER)
        + window_update(1, MAX_WINDOW - 65_535)
        + settings((INITIAL_WINDOW_SIZE, 65_536)),
        connection_error(FLOW_CONTROL_ERROR),
    ),
    Case(
        "6.10",
        "several CONTINUATION frames",
        frame(HEADERS, 0, 1, BLOCK[:9])
        + frame(CONTINUATION, 0, 1, BLOCK[9:30])
        + frame(CONTINUATION, 0, 1)
        + frame(CONTINUATION, END_HEADERS, 1, BLOCK[30:])
        + frame(DATA, END_STREAM, 1, BODY),
        answers,
    ),
    Case(
        "6.10",
        "DATA instead of CONTINUATION",
        frame(HEADERS, 0, 1, BLOCK) + frame(DATA, END_STREAM, 1, BODY),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "6.10",
        "stream 0",
        frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, END_HEADERS, 0, BLOCK),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "6.10",
        "after the end of a block",
        head() + frame(CONTINUATION, END_HEADERS, 1, b"\0\1a\1b"),
        connection_error(PROTOCOL_ERROR),
    ),
    Case(
        "8.4",
        "PUSH_PROMISE",
        head() + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + BLOCK),
        connection_error(PROTOCOL_ERROR),
    ),
)
