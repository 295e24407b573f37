"""How many TLS handshakes may be in progress, and which of them computes next."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

PEER_SHARE = 0.5  # of all handshakes in progress that one address may hold


class Handshaking(ABC):
    """A connection in its handshake. `step` runs in a thread, all else on the event loop's."""

    peer: str  # the address that takes turns with others
    is_trusted: bool  # the peer may hold all places, as proxies do
    is_over: bool

    @abstractmethod
    def step(self) -> None:
        """Computes with what the client has sent. Must not raise."""

    @abstractmethod
    def step_done(self) -> None:
        """Handles the result of `step`."""

    @abstractmethod
    def evict(self) -> None:
        """Ends the handshake: others need its place."""


class _Peer:
    """The handshakes of one address."""

    __slots__ = ("count", "ready", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: dict[Handshaking, None] = {}  # for bytes of the client, oldest first
        self.ready: deque[Handshaking] = deque()  # to compute, oldest first


class HandshakeTurns:
    """Bounds the handshakes of a server, and takes their computing off the event loop.

    A handshake costs 0.2 ms (P-256) to 2 ms (RSA 4096) of processor time; OpenSSL needs no GIL.
    Addresses take turns, so that a flood from one delays only its own handshakes. If all places are
    taken, the handshake that has waited longest for its client gives its place up: a client that
    opens connections and sends nothing keeps nobody out.
    """

    def __init__(self, max_in_progress: int, threads: int) -> None:
        self._max = max_in_progress
        self._max_per_peer = max(1, int(max_in_progress * PEER_SHARE))
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, "tls-handshake")
        self._loop = asyncio.get_running_loop()
        self._peers: dict[str, _Peer] = {}
        self._waiting: dict[Handshaking, None] = {}  # all peers', oldest first
        self._turns: deque[_Peer] = deque()  # peers with ready handshakes, each once
        self._all: set[Handshaking] = set()
        self._running = 0
        self._is_closed = False

    @property
    def in_progress(self) -> int:
        return len(self._all)

    def enter(self, handshake: Handshaking) -> bool:
        """Takes a place for a new handshake, which waits for its client. False if there is none."""
        if self._is_closed:
            return False
        peer = self._peers.get(handshake.peer)
        is_full = peer is not None and peer.count >= self._max_per_peer
        if peer is not None and is_full and not handshake.is_trusted and not _evict(peer.waiting):
            return False
        if len(self._all) >= self._max and not _evict(self._waiting):
            return False
        peer = self._peers.setdefault(handshake.peer, _Peer())
        peer.count += 1
        self._all.add(handshake)
        self._wait(peer, handshake)
        return True

    def ready(self, handshake: Handshaking) -> None:
        """The client has sent something: `step` runs when it is the handshake's turn."""
        peer = self._peers[handshake.peer]
        self._stop_waiting(peer, handshake)
        if not peer.ready:
            self._turns.append(peer)
        peer.ready.append(handshake)
        self._run_next()

    def wait(self, handshake: Handshaking) -> None:
        """The handshake has computed and waits for its client again."""
        self._wait(self._peers[handshake.peer], handshake)

    def leave(self, handshake: Handshaking) -> None:
        """Gives the place up. A handshake that is ready stays so, and computes nothing then."""
        peer = self._peers[handshake.peer]
        self._stop_waiting(peer, handshake)
        peer.count -= 1
        self._all.discard(handshake)
        if not peer.count:
            del self._peers[handshake.peer]

    def close(self) -> None:
        """Ends all handshakes. Waits for the steps that compute now."""
        self._is_closed = True
        for handshake in list(self._all):
            handshake.evict()
        self._executor.shutdown(cancel_futures=True)

    def _wait(self, peer: _Peer, handshake: Handshaking) -> None:
        peer.waiting[handshake] = self._waiting[handshake] = None

    def _stop_waiting(self, peer: _Peer, handshake: Handshaking) -> None:
        peer.waiting.pop(handshake, None)
        self._waiting.pop(handshake, None)

    def _run_next(self) -> None:
        while self._turns and self._running < self._threads:
            peer = self._turns.popleft()
            handshake = peer.ready.popleft()
            if peer.ready:
                self._turns.append(peer)
            if not handshake.is_over:
                self._running += 1
                done = self._loop.run_in_executor(self._executor, handshake.step)
                done.add_done_callback(partial(self._step_done, handshake))

    def _step_done(self, handshake: Handshaking, done: asyncio.Future[None]) -> None:
        self._running -= 1
        self._run_next()
        handshake.step_done()


def _evict(waiting: dict[Handshaking, None]) -> bool:
    """Ends the handshake that has waited longest, if any waits."""
    for handshake in waiting:
        handshake.evict()
        return True
    return False
