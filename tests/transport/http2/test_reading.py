"""Connections share the turns of the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.transport.http2 import reading
from server.transport.http2.reading import InputReader, ReadingTurns


class Library:
    """In the place of libnghttp2: each slice of input takes some time and leads to one event."""

    def __init__(self, now: Clock, seconds_per_kib: float) -> None:
        self._now = now
        self._seconds_per_kib = seconds_per_kib
        self.slices: list[int] = []

    def receive_data(self, data: Any) -> None:
        self.slices.append(len(data))
        self._now.seconds += self._seconds_per_kib * len(data) / 1024

    def events(self) -> list[Any]:
        return [len(self.slices)]


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(reading, "clock", lambda: self.seconds)


def reader_of(library: Any, turns: ReadingTurns) -> InputReader:
    return InputReader(library, turns, lambda events: None)


async def test_an_expensive_client_reads_for_a_short_time_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Clock(monkeypatch)
    library = Library(now, seconds_per_kib=0.0005)
    reader = reader_of(library, ReadingTurns())
    reader.read(bytes(256 << 10))
    longest_s = 0.0
    while reader.is_paused:
        began_s = now.seconds
        reader.read_on()
        longest_s = max(longest_s, now.seconds - began_s)
    assert sum(library.slices) == 256 << 10
    assert longest_s < 3 * reading.TURN_BUDGET_S


async def test_a_cheap_client_reads_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(Clock(monkeypatch), seconds_per_kib=1e-6)
    reader = reader_of(library, ReadingTurns())
    for _ in range(3):
        reader.read(bytes(200 << 10))
        assert not reader.is_paused
    assert library.slices[-1] == 200 << 10  # in one slice, once the client is known


async def test_when_all_have_used_the_turn_up_the_next_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Clock(monkeypatch)
    turns = ReadingTurns()
    libraries = [Library(now, seconds_per_kib=0.001) for _ in range(10)]
    readers = [reader_of(library, turns) for library in libraries]
    for reader in readers:
        reader.read(bytes(8 << 10))
    assert now.seconds < 0.1
    assert [bool(library.slices) for library in libraries].count(True) < 4
    assert all(
        reader.is_new for reader, one in zip(readers, libraries, strict=True) if not one.slices
    )
    await asyncio.sleep(0)
    assert not turns.is_over


async def test_with_many_connections_that_wait_a_round_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of 300 has more to read than it may in one turn."""
    now = Clock(monkeypatch)
    turns = ReadingTurns()
    rounds = [0] * 300

    def join(number: int, reader: InputReader) -> None:
        def read_on() -> None:
            rounds[number] += 1
            reader.read_on()
            if reader.is_paused:
                turns.add(read_on)

        reader.read(bytes(64 << 10))
        turns.add(read_on, is_new=reader.is_new)

    for number in range(300):
        join(number, reader_of(Library(now, seconds_per_kib=0.0002), turns))
    began_s = now.seconds
    while min(rounds) < 1:
        await asyncio.sleep(0)
    assert now.seconds - began_s < 0.5
