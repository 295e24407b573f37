"""A process that runs attacks, so that it doesn't share an interpreter with the victim.

`python -m tests.transport.attacks.attacker` reads lines `NAME PORT SECONDS` and answers each with a
line of JSON when that attack is over.
"""

from __future__ import annotations

import heapq
import json
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count

from tests.support.http2_frames import (
    DATA,
    END_STREAM,
    frame,
)
from tests.support.http2_windows import Windows
from tests.transport.attacks.attack import Attack, Body, Close
from tests.transport.attacks.catalogue import ATTACKS

SOURCE = "127.0.0.2"  # not the victim's address, because there are limits by address
IP_BIND_ADDRESS_NO_PORT = 24  # Linux: choose the port at `connect`, which has many more of them
READ_BYTES = 1 << 18
SHORTEST_PAUSE_S = 0.0005
RECONNECT_S = 0.002
FRAME_BYTES = 16_384


@dataclass
class Effort:
    """What an attack did."""

    connections: int = 0
    ended_by_server: int = 0
    sent_bytes: int = 0
    read_bytes: int = 0


class HostileConnections:
    """The connections of one attack. A connection that the server ends is made again."""

    def __init__(self, attack: Attack, address: tuple[str, int]) -> None:
        self._attack = attack
        self._address = address
        self._selector = selectors.DefaultSelector()
        self._sleeping: list[tuple[float, int, _Connection | None]] = []
        self._order = count()
        self.effort = Effort()

    def run(self, seconds: float) -> None:
        ends_s = time.monotonic() + seconds
        for _ in range(self._attack.connections):
            self._sleep(None, 0)
        while (now_s := time.monotonic()) < ends_s:
            while self._sleeping and self._sleeping[0][0] <= now_s:
                self._wake(heapq.heappop(self._sleeping)[2])
            wait_s = ends_s - now_s
            if self._sleeping:
                wait_s = min(wait_s, max(0.0, self._sleeping[0][0] - now_s))
            for key, ready in self._selector.select(wait_s):
                connection: _Connection = key.data
                if not connection.handle(ready):
                    self.effort.ended_by_server += not connection.is_closing
                    self._end(connection)

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()
        self._selector.close()

    def _sleep(self, connection: _Connection | None, delay_s: float) -> None:
        """Wakes the connection later; None makes a new one."""
        entry = (time.monotonic() + delay_s, next(self._order), connection)
        heapq.heappush(self._sleeping, entry)

    def _wake(self, connection: _Connection | None) -> None:
        if connection is None:
            made = socket.socket()
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            made.bind((SOURCE, 0))
            made.connect_ex(self._address)  # a failure shows when it is used
            self.effort.connections += 1
            _Connection(made, self._attack, self).resume()
        elif connection.socket.fileno() >= 0:
            connection.resume()

    def _end(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._sleep(None, 0 if connection.is_closing else RECONNECT_S)

    def pause(self, connection: _Connection, delay_s: float) -> None:
        self._sleep(connection, max(delay_s, SHORTEST_PAUSE_S))

    def watch(self, connection: _Connection, events: int) -> None:
        """Waits for these events of the connection."""
        is_known = connection.socket in self._selector.get_map()
        if not events:
            if is_known:
                self._selector.unregister(connection.socket)
        elif is_known:
            self._selector.modify(connection.socket, events, connection)
        else:
            self._selector.register(connection.socket, events, connection)


class _Connection:
    """One hostile connection: sends its pieces, and reads if the attack does."""

    def __init__(self, made: socket.socket, attack: Attack, owner: HostileConnections) -> None:
        self.socket = made
        self._owner = owner
        self._reads = selectors.EVENT_READ if attack.reads else 0
        self._pieces = attack.pieces()
        self._unsent = memoryview(b"")
        self.is_closing = False
        self._body: Body | None = None
        self._body_start = 0
        self._windows = Windows()

    def resume(self) -> None:
        self._owner.watch(self, self._reads | selectors.EVENT_WRITE)

    def handle(self, ready: int) -> bool:
        """Returns False if the server has ended the connection."""
        try:
            if ready & selectors.EVENT_READ:
                data = self.socket.recv(READ_BYTES)
                self._owner.effort.read_bytes += len(data)
                if not data:
                    return False
                if self._body is not None:
                    self.resume()
                self._windows.read(data)
            if ready & selectors.EVENT_WRITE:
                self._send()
            if self.is_closing:
                return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _send(self) -> None:
        if not self._unsent and not self._fill():
            return
        sent = self.socket.send(self._unsent)
        self._owner.effort.sent_bytes += sent
        self._unsent = self._unsent[sent:]

    def _fill(self) -> bool:
        """Returns whether there is something to send now."""
        if self._body is None:
            piece = next(self._pieces, None)
            if isinstance(piece, bytes):
                self._unsent = memoryview(piece)
                return True
            if isinstance(piece, Close):
                self.is_closing = True
                return False
            self._owner.watch(self, self._reads)
            if not isinstance(piece, Body):
                if piece is not None:
                    self._owner.pause(self, piece)
                return False
            self._body, self._body_start = piece, 0
        frames = self._windows.acknowledgements()
        while size := min(
            FRAME_BYTES,
            len(self._body.data) - self._body_start,
            self._windows.left(self._body.stream),
        ):
            part = self._body.data[self._body_start : self._body_start + size]
            self._body_start += size
            self._windows.use(self._body.stream, size)
            frames.append(frame(DATA, 0, self._body.stream, part))
        if self._body_start == len(self._body.data):
            if self._body.ends:
                frames.append(frame(DATA, END_STREAM, self._body.stream))
            self._body = None
            self.resume()
        elif not frames:
            self._owner.watch(self, self._reads)  # until the server opens a window
        self._unsent = memoryview(b"".join(frames))
        return bool(frames)


def main() -> None:
    for line in sys.stdin:
        name, port, seconds = line.split()
        hostile = HostileConnections(ATTACKS[name], ("127.0.0.1", int(port)))
        try:
            hostile.run(float(seconds))
        finally:
            hostile.close()
        print(json.dumps(asdict(hostile.effort)), flush=True)


if __name__ == "__main__":
    main()
