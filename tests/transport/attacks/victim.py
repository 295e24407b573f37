"""Another client of a server under attack, which measures how long its own calls take."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpack import Decoder

from tests.support.http2_frames import (
    ACK,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HELLO,
    PING,
    RST_STREAM,
    SETTINGS,
    call,
    frame,
    window_update,
)
from tests.transport.attacks.attack import CLASSIFY, DIGIT, HEALTH_CHECK

HOST = "127.0.0.1"
TIMEOUT_S = 30.0
CALLS_PER_CONNECTION = 5
PAUSE_S = 0.004


class GrpcVictim:
    """A gRPC client with one call at a time on one connection."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._socket = socket.create_connection((HOST, port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname=HOST)
        self._socket.sendall(HELLO)
        self._decoder = Decoder()
        self._stream = -1
        self._buffer = b""

    def status(self, path: str, data: bytes) -> str:
        """The gRPC status of a call."""
        self._stream += 2
        self._socket.sendall(call(self._stream, path, data))
        while True:
            kind, flags, stream, payload = self._frame()
            if kind == SETTINGS and not flags & ACK:
                self._socket.sendall(frame(SETTINGS, ACK))
            elif kind == PING and not flags & ACK:
                self._socket.sendall(frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                raise ConnectionError(f"the server sent GOAWAY: {payload!r}")
            elif kind == RST_STREAM:
                raise ConnectionError(f"the server reset the call: {payload!r}")
            elif kind == DATA and payload:
                self._socket.sendall(window_update(0, len(payload)))
            elif kind == HEADERS:
                fields = dict(self._decoder.decode(payload, raw=True))
                if flags & END_STREAM and stream == self._stream:
                    return fields[b"grpc-status"].decode()

    def close(self) -> None:
        self._socket.close()

    def _frame(self) -> tuple[int, int, int, bytes]:
        head = self._read(9)
        payload = self._read(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), payload

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("the server closed the victim's connection")
            self._buffer += piece
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


class HttpVictim:
    """A client of the HTTP port that asks for /healthz."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
        if tls is not None:
            self._connection = http.client.HTTPSConnection(
                HOST, port, timeout=TIMEOUT_S, context=tls
            )
        self._connection.connect()

    def status(self) -> str:
        self._connection.request("GET", "/healthz")
        response = self._connection.getresponse()
        response.read()
        return "0" if response.status == 200 else str(response.status)

    def close(self) -> None:
        self._connection.close()


class Echo:
    """A thread-less process beside the server that only sends back what it gets.

    How long it takes shows how late this machine runs a process that has nothing else to do.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), TIMEOUT_S)

    def answer(self) -> None:
        self._socket.sendall(b"x")
        assert self._socket.recv(1) == b"x"

    def close(self) -> None:
        self._socket.close()


@dataclass
class Experience:
    """How long each of the victim's calls took, and with which status it ended."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)  # of calls that failed

    def add(self, kind: str, seconds: float, status: str) -> None:
        self.seconds.setdefault(kind, []).append(seconds)
        if status != "0":
            name = f"{kind} {status}"
            self.statuses[name] = self.statuses.get(name, 0) + 1

    def longest_s(self, *kinds: str) -> float:
        return max(max(self.seconds.get(kind, [0.0])) for kind in kinds)

    def all_s(self, *kinds: str) -> list[float]:
        return sorted(one for kind in kinds for one in self.seconds.get(kind, []))


CALLS = ("health", "classify", "healthz")  # what the limits are for


class Victim:
    """Calls health, Classify and /healthz in turn, now and then on new connections."""

    def __init__(
        self,
        port: int,
        http_port: int | None,
        echo_port: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._port = port
        self._tls = tls
        self._http_port = http_port
        self._echo = Echo(echo_port)
        self._grpc = GrpcVictim(port, tls)
        self._http = HttpVictim(http_port, tls) if http_port else None

    def close(self) -> None:
        self._grpc.close()
        self._echo.close()
        if self._http:
            self._http.close()

    def live_while(self, goes_on: Callable[[], bool]) -> Experience:
        seen = Experience()
        rounds = 0
        while goes_on():
            self.call_once(seen)
            rounds += 1
            if rounds % CALLS_PER_CONNECTION == 0:
                self._reconnect(seen)
            time.sleep(PAUSE_S)
        return seen

    def call_once(self, seen: Experience) -> None:
        self._timed(seen, "health", lambda: self._grpc.status(HEALTH_CHECK, b""))
        self._timed(seen, "classify", lambda: self._grpc.status(CLASSIFY, DIGIT))
        if self._http:
            self._timed(seen, "healthz", self._http.status)
        began_s = time.perf_counter()
        self._echo.answer()
        seen.add("echo", time.perf_counter() - began_s, "0")

    def _timed(self, seen: Experience, kind: str, make_call: Callable[[], str]) -> None:
        began_s = time.perf_counter()
        status = make_call()
        seen.add(kind, time.perf_counter() - began_s, status)

    def _reconnect(self, seen: Experience) -> None:
        """The first call on a new connection counts as the connection's time too."""
        self._grpc.close()
        began_s = time.perf_counter()
        self._grpc = GrpcVictim(self._port, self._tls)
        status = self._grpc.status(HEALTH_CHECK, b"")
        seen.add("health", time.perf_counter() - began_s, status)
        if self._http and self._http_port:
            self._http.close()
            began_s = time.perf_counter()
            self._http = HttpVictim(self._http_port, self._tls)
            status = self._http.status()
            seen.add("healthz", time.perf_counter() - began_s, status)
