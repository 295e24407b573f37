"""Section 8: the headers of a request, and its length."""

from __future__ import annotations

from tests.support.http2_frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PROTOCOL_ERROR,
    block,
    frame,
    message,
    request_fields,
)
from tests.transport.conformance.case import (
    ECHO,
    Case,
    Demand,
    answers,
    either,
    head,
    stream_error,
)

BODY = frame(DATA, END_STREAM, 1, message(b"word"))
LENGTH = b"9"  # of that body
MALFORMED = stream_error(PROTOCOL_ERROR)


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in request_fields(ECHO) if pair[0] != name]


def request(*fields: tuple[bytes, bytes]) -> bytes:
    return frame(HEADERS, END_HEADERS, 1, block(fields)) + BODY


def case(section: str, name: str, *fields: tuple[bytes, bytes], demand: Demand = MALFORMED) -> Case:
    return Case(section, name, request(*fields), demand)


def more(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of a call and another one."""
    return [*request_fields(ECHO), (name, value)]


ALL = request_fields(ECHO)
PSEUDO, REGULAR = ALL[:4], ALL[4:]

CASES = (
    case("8.1", "a request", *ALL, demand=answers),
    Case(
        "8.1",
        "trailers without END_STREAM",
        head() + frame(DATA, 0, 1, message(b"word")) + frame(HEADERS, END_HEADERS, 1, b"\0\1a\1b"),
        MALFORMED,
    ),
    case("8.2.1", "a name in capitals", *more(b"X-TEST", b"ok")),
    case("8.2.1", "a name with a space", *more(b"x test", b"ok")),
    case("8.2.1", "an empty name", *more(b"", b"ok")),
    case("8.2.1", "a name with a colon inside", *more(b"x:test", b"ok")),
    case("8.2.1", "a value with CR and LF", *more(b"x-test", b"a\r\nb: c")),
    case("8.2.1", "a value with NUL", *more(b"x-test", b"a\0b")),
    # A value that begins with a space is malformed; C core and others only trim it.
    case(
        "8.2.1",
        "a value that begins with a space",
        *more(b"x-test", b" a"),
        demand=either(MALFORMED, answers),
    ),
    case("8.2.2", "connection", *more(b"connection", b"keep-alive")),
    case("8.2.2", "transfer-encoding", *more(b"transfer-encoding", b"chunked")),
    case("8.2.2", "upgrade", *more(b"upgrade", b"h2c")),
    case("8.2.2", "keep-alive", *more(b"keep-alive", b"5")),
    case("8.2.2", "proxy-connection", *more(b"proxy-connection", b"keep-alive")),
    case("8.2.2", "te with another value", *without(b"te"), (b"te", b"gzip")),
    case("8.3", "an unknown pseudo-header", *PSEUDO, (b":test", b"ok"), *REGULAR),
    case("8.3", "a pseudo-header of responses", *PSEUDO, (b":status", b"200"), *REGULAR),
    case("8.3", "a pseudo-header after a header", *PSEUDO[1:], *REGULAR, PSEUDO[0]),
    Case(
        "8.3",
        "a pseudo-header in trailers",
        head()
        + frame(DATA, 0, 1, message(b"word"))
        + frame(HEADERS, END_HEADERS | END_STREAM, 1, block([(b":method", b"GET")])),
        MALFORMED,
    ),
    case("8.3.1", "an empty path", *without(b":path")[:2], (b":path", b""), *without(b":path")[2:]),
    case("8.3.1", "no method", *without(b":method")),
    case("8.3.1", "no scheme", *without(b":scheme")),
    case("8.3.1", "no path", *without(b":path")),
    case("8.3.1", "two methods", PSEUDO[0], *ALL),
    case("8.3.1", "two schemes", PSEUDO[1], *ALL),
    case("8.3.1", "two paths", PSEUDO[2], *ALL),
    case("8.3.1", "two authorities", PSEUDO[3], *ALL),
    # Required where the scheme has an authority, which http has.
    case("8.3.1", "no authority", *without(b":authority"), demand=either(MALFORMED, answers)),
    case("8.1.1", "the right content-length", *more(b"content-length", LENGTH), demand=answers),
    case("8.1.1", "content-length of one frame", *more(b"content-length", b"1")),
    case("8.1.1", "content-length that is no number", *more(b"content-length", b"x")),
    case(
        "8.1.1",
        "two values of content-length",
        *more(b"content-length", LENGTH),
        (b"content-length", b"1"),
    ),
    Case(
        "8.1.1",
        "content-length of several frames",
        head(ECHO, (b"content-length", b"1"))
        + frame(DATA, 0, 1, message(b"word")[:4])
        + frame(DATA, END_STREAM, 1, message(b"word")[4:]),
        MALFORMED,
    ),
    Case(
        "8.1.1",
        "content-length above the body",
        head(ECHO, (b"content-length", b"10")) + BODY,
        MALFORMED,
    ),
)
