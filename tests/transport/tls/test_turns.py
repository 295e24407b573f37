"""Handshakes take turns by address, and give their places up in the right order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.transport.tls.turns import HandshakeTurns, Handshaking


class Recorded(Handshaking):
    """A handshake whose steps are noted; it is over after the first."""

    def __init__(
        self, turns: HandshakeTurns, peer: str, log: list[str], *, is_trusted: bool = False
    ) -> None:
        self.peer = peer
        self.is_trusted = is_trusted
        self.is_over = False
        self.gate: threading.Event | None = None
        self.done = asyncio.Event()
        self._turns = turns
        self._log = log

    def step(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(20)
        self._log.append(self.peer)

    def step_done(self) -> None:
        self.done.set()
        if not self.is_over:
            self.leave()

    def evict(self) -> None:
        self._log.append(f"{self.peer} evicted")
        self.leave()

    def leave(self) -> None:
        self.is_over = True
        self._turns.leave(self)


@contextmanager
def handshake_turns(max_in_progress: int) -> Iterator[HandshakeTurns]:
    turns = HandshakeTurns(max_in_progress, threads=1)
    yield turns
    turns.close()


async def test_an_address_with_many_handshakes_delays_only_its_own() -> None:
    log: list[str] = []
    with handshake_turns(100) as turns:
        flood = [Recorded(turns, "flood", log) for _ in range(8)]
        honest = [Recorded(turns, host, log) for host in ("first", "second")]
        flood[0].gate = threading.Event()
        for one in (*flood, *honest):
            assert turns.enter(one)
            turns.ready(one)
        flood[0].gate.set()
        for one in (*flood, *honest):
            await one.done.wait()
        assert log[:5] == ["flood", "flood", "first", "second", "flood"]
        assert turns.in_progress == 0


async def test_a_full_server_ends_the_handshake_that_is_silent_for_the_longest_time() -> None:
    log: list[str] = []
    with handshake_turns(4) as turns:
        hosts = ("a", "b", "c", "d")
        waiting = [Recorded(turns, host, log) for host in hosts]
        for one in waiting:
            assert turns.enter(one)
        turns.ready(waiting[0])  # it has sent something
        await waiting[0].done.wait()
        assert turns.enter(Recorded(turns, "e", log))
        assert turns.enter(Recorded(turns, "f", log))
        assert log == ["a", "b evicted"]


async def test_an_address_that_holds_its_share_ends_its_own_handshakes() -> None:
    log: list[str] = []
    with handshake_turns(4) as turns:
        assert turns.enter(Recorded(turns, "honest", log))
        for _ in range(3):
            assert turns.enter(Recorded(turns, "flood", log))
        assert log == ["flood evicted"]
        assert turns.in_progress == 3


async def test_a_trusted_address_may_hold_all_places() -> None:
    log: list[str] = []
    with handshake_turns(4) as turns:
        for _ in range(4):
            assert turns.enter(Recorded(turns, "proxy", log, is_trusted=True))
        assert turns.in_progress == 4
        assert not log


async def test_handshakes_that_compute_keep_their_places() -> None:
    log: list[str] = []
    with handshake_turns(2) as turns:
        first, second = (Recorded(turns, host, log) for host in ("a", "b"))
        first.gate = threading.Event()
        for one in (first, second):
            assert turns.enter(one)
            turns.ready(one)
        assert not turns.enter(Recorded(turns, "c", log))
        first.gate.set()
        await second.done.wait()
        assert turns.enter(Recorded(turns, "c", log))


async def test_a_handshake_that_ended_while_it_was_ready_computes_nothing() -> None:
    log: list[str] = []
    with handshake_turns(10) as turns:
        first, left, last = (Recorded(turns, host, log) for host in ("a", "b", "c"))
        first.gate = threading.Event()
        for one in (first, left, last):
            assert turns.enter(one)
            turns.ready(one)
        left.leave()
        first.gate.set()
        await last.done.wait()
        assert log == ["a", "c"]
        assert turns.in_progress == 0
