"""What a case of conformance is, and how it is judged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.support.http2_frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HELLO,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
    request_block,
)

STREAM = 1  # the stream of most cases
ECHO, NEVER = "/test/Echo", "/test/Never"
PINGS = (b"ping one", b"ping two")


@dataclass
class Reaction:
    """All frames that the server sent, and whether it has closed the connection."""

    frames: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    is_closed: bool = False

    def reset_code(self, stream: int) -> int | None:
        """The code with which the server reset the stream."""
        for kind, _, of, payload in self.frames:
            if kind == RST_STREAM and of == stream:
                return int.from_bytes(payload, "big")
        return None

    def goaway_code(self) -> int | None:
        for kind, _, _, payload in self.frames:
            if kind == GOAWAY:
                return int.from_bytes(payload[4:8], "big")
        return None

    def has_answered(self, stream: int) -> bool:
        """Whether a whole response has come."""
        return any(
            kind == HEADERS and of == stream and flags & END_STREAM
            for kind, flags, of, _ in self.frames
        )

    def has(self, kind: int, *, flags: int = 0, stream: int | None = None) -> bool:
        return any(
            found == kind and given & flags == flags and stream in (None, of)
            for found, given, of, _ in self.frames
        )


# Returns whether the reaction conforms.
Demand = Callable[[Reaction], bool]


def connection_error(*codes: int) -> Demand:
    """The server ends the connection, with GOAWAY and one of the codes (5.4.1)."""

    def demand(seen: Reaction) -> bool:
        return seen.is_closed and seen.goaway_code() in (None, *codes)

    return demand


def stream_error(*codes: int, stream: int = STREAM) -> Demand:
    """The server resets the stream with one of the codes, or ends the connection (5.4.2)."""

    def demand(seen: Reaction) -> bool:
        return seen.reset_code(stream) in codes or connection_error(*codes)(seen)

    return demand


def lives(seen: Reaction) -> bool:
    """The server goes on: it answers a ping."""
    return not seen.is_closed and seen.goaway_code() is None


def answers(seen: Reaction, stream: int = STREAM) -> bool:
    return lives(seen) and seen.has_answered(stream)


def either(*demands: Demand) -> Demand:
    """The RFC allows several reactions."""
    return lambda seen: any(one(seen) for one in demands)


def all_of(*demands: Demand) -> Demand:
    return lambda seen: all(one(seen) for one in demands)


@dataclass(frozen=True)
class Case:
    """Bytes that a client sends, and what the server must do."""

    section: str  # of RFC 9113, or of RFC 7541 with a leading "hpack "
    name: str
    sends: bytes
    demand: Demand
    first: bytes = HELLO  # what opens the connection
    then: bytes = b""  # sent once the stream has a whole response
    deviation: str = ""  # why the server does something else

    @property
    def title(self) -> str:
        return f"{self.section} {self.name}".replace(" ", "-")


def head(
    path: str = ECHO, *more: tuple[bytes, bytes], stream: int = STREAM, flags: int = 0
) -> bytes:
    """A HEADERS frame of a gRPC call."""
    return frame(HEADERS, END_HEADERS | flags, stream, request_block(path, *more))


async def reaction(port: int, case: Case) -> Reaction:
    """Sends the case's bytes, and two pings after them, and reads up to the second answer.

    One ping would not do: the server may answer it before it reacts to what came earlier.
    """
    seen = Reaction()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(case.first)
        if case.first.startswith(PREFACE):
            await _read_until(reader, seen, lambda: seen.has(SETTINGS))
            writer.write(frame(SETTINGS, ACK))
        writer.write(case.sends)
        if case.then:
            await _read_until(reader, seen, lambda: seen.has_answered(STREAM))
            writer.write(case.then)
        for ping in PINGS:
            writer.write(frame(PING, 0, 0, ping))
            await _read_until(reader, seen, partial(_is_answered, seen, ping))
            if seen.is_closed:
                break
        if seen.goaway_code() is not None:
            await _read_until(reader, seen, lambda: False)
    finally:
        writer.close()
    return seen


def _is_answered(seen: Reaction, ping: bytes) -> bool:
    return any(
        kind == PING and flags & ACK and data == ping for kind, flags, _, data in seen.frames
    )


async def _read_until(
    reader: asyncio.StreamReader, seen: Reaction, is_done: Callable[[], bool]
) -> None:
    while not is_done() and not seen.is_closed:
        try:
            start = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(start[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            seen.is_closed = True
            return
        stream = int.from_bytes(start[5:], "big")
        seen.frames.append((start[3], start[4], stream, payload))
