"""Floods of frames are cut with a reason; honest clients that send many of them are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.http2 import frame_limits
from server.transport.http2.frame_limits import FrameLimits, Work
from tests.support.http2_peers import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    HELLO,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    bare,
    frame,
    headers,
    raw,
)

MANY_STREAMS = TransportLimits(message_bytes=1 << 20, receiving_bytes=8 << 20, streams=100_000)
NEVER = headers(path="/test/Never")
Frames = Iterator[bytes]


def each_stream(frames: Callable[[int], bytes]) -> Frames:
    return (frames(stream) for stream in count(1, 2))


def repeated(one: bytes, before: bytes = b"") -> Frames:
    yield before
    while True:
        yield one


def cancelled(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, NEVER) + frame(RST_STREAM, 0, stream, bytes(4))


def wrong_length(path: str) -> Callable[[int], bytes]:
    """Calls whose body has not the length that their headers give: the server must reset them."""
    sent = headers(path=path, content_length="1")

    def frames(stream: int) -> bytes:
        return frame(HEADERS, END_HEADERS, stream, sent) + frame(DATA, END_STREAM, stream, b"12")

    return frames


def many_fields(stream: int) -> bytes:
    fields = headers() + b"\0\x01a\0" * 200
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, fields)


OPEN = frame(HEADERS, END_HEADERS, 1, headers(path="/test/Each"))

FLOODS: dict[str, tuple[str, Callable[[], Frames]]] = {
    "cancelled": ("resets", lambda: each_stream(cancelled)),
    "reset by the server": (
        "resets",
        lambda: each_stream(wrong_length("/test/Never")),
    ),
    "refused": ("resets", lambda: each_stream(wrong_length("/test/Missing"))),
    "reset again": (
        "resets",
        lambda: repeated(frame(RST_STREAM, 0, 1, CANCEL.to_bytes(4, "big")), cancelled(1)),
    ),
    "pings": ("pings", lambda: repeated(frame(PING, 0, 0, bytes(8)))),
    "settings": ("settings", lambda: repeated(frame(SETTINGS))),
    "windows": ("window_updates", lambda: repeated(frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"))),
    "crumbs": ("small_data", lambda: repeated(frame(DATA, 0, 1, b"\0") * 100, OPEN)),
    "many fields": ("large_headers", lambda: each_stream(many_fields)),
    "priorities": ("flood", lambda: repeated(frame(PRIORITY, 0, 1, bytes(4) + b"\x10") * 100)),
    "unknown frames": ("flood", lambda: repeated(frame(0xBB) * 100)),
    "empty data": ("flood", lambda: repeated(frame(DATA, 0, 1) * 100, OPEN)),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_ends_its_own_connection_with_a_reason(flood: str) -> None:
    reason, frames = FLOODS[flood]
    async with bare(MANY_STREAMS) as one, raw(one, HELLO) as other, raw(one, HELLO) as connection:
        sending = frames()

        async def until_cut() -> bytes:
            while True:
                kind, _, _, payload = await connection.frame()
                if kind == GOAWAY:
                    return payload

        cut = asyncio.create_task(until_cut())
        while not cut.done():
            connection.send(b"".join(next(sending) for _ in range(200)))
            await connection.writer.drain()
            await asyncio.sleep(0)
        payload = await cut
        assert int.from_bytes(payload[4:8], "big") == ENHANCE_YOUR_CALM
        assert one.cuts == {reason: 1}
        if reason != "flood":  # libnghttp2 sends no text
            assert payload[8:] == reason.encode()
        await other.echoes(1)


async def test_a_call_with_too_many_fields_is_refused_alone() -> None:
    async with bare() as one, raw(one, HELLO) as connection:
        connection.send(many_fields(1))
        _, payload = await connection.until(HEADERS, 1)
        assert b"grpc-status\x018" in payload
        assert b"100 are allowed" in payload
        await connection.echoes(3)


class Client:
    """A client that sends frames at a pace, and gets answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(frame_limits, "clock", lambda: self.now_s)
        self.limits = FrameLimits()

    def lasts(self, kind: str, per_s: int, answers_per_s: int = 0, seconds: int = 600) -> bool:
        """Whether the limits allow so many frames of a kind each second for so long."""
        for sent in range(per_s * seconds):
            self.now_s = sent / per_s
            answers = int(self.now_s * answers_per_s)
            if not self.limits.allows(kind, Work(answers, answers, 200 * answers)):
                return False
        return True


@pytest.mark.parametrize(
    ("kind", "per_s", "answers_per_s"),
    [
        ("resets", 500, 500),  # a proxy whose clients all cancel
        ("resets", 950, 0),
        ("resets", 5_000, 10_000),  # half of the calls
        ("pings", 1, 0),
        ("pings", 5_000, 5_000),  # grpc-go pings after data
        ("settings", 10, 0),
        ("window_updates", 20_000, 10_000),  # two for each answer
        ("small_data", 4_000, 0),
    ],
)
def test_honest_clients_are_never_cut(
    kind: str, per_s: int, answers_per_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Client(monkeypatch).lasts(kind, per_s, answers_per_s, seconds=20)


@pytest.mark.parametrize(
    ("kind", "per_s", "answers_per_s"),
    [
        ("resets", 5_000, 0),
        ("resets", 10_000, 10_000),
        ("pings", 1_000, 0),
        ("settings", 100, 0),
        ("window_updates", 20_000, 100),
        ("large_headers", 100, 0),
    ],
)
def test_floods_are_cut_within_20_s(
    kind: str, per_s: int, answers_per_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Client(monkeypatch).lasts(kind, per_s, answers_per_s, seconds=20)
