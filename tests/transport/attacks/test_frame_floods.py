"""A client that floods the server does not keep it from answering another client."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.http2_peers import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    HELLO,
    frame,
    headers,
    message,
)
from tests.transport.attacks.frame_floods import FLOODS, Flood

ATTACK_S = 0.8
CONNECTIONS = 2
MAX_ANSWER_S = 0.5  # for the other client's call, whatever the attackers do
MAX_RECOVERY_S = 1.0  # after an attack
TIMEOUT_S = 10.0

HEALTH = headers(path="/convserve.v1.Classifier/GetModel")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server in another process, on the transport alone."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.targets.null_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.communicate(timeout=TIMEOUT_S)
    assert server.returncode == 0


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: str(flood.__name__))
def test_another_client_is_answered_during_a_flood(port: int, flood: Flood) -> None:
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as victim:
        victim.sendall(HELLO)
        stream = iter(range(1, 1 << 30, 2))
        assert (
            _answer_s(victim, next(stream)) < MAX_RECOVERY_S
        )  # another attack may just have ended
        slowest_s = 0.0
        with _attackers(port, flood) as attackers:
            while any(one.is_alive() for one in attackers):
                slowest_s = max(slowest_s, _answer_s(victim, next(stream)))
                time.sleep(0.005)
        slowest_s = max(slowest_s, _answer_s(victim, next(stream)))
    assert slowest_s < MAX_ANSWER_S


@contextmanager
def _attackers(port: int, flood: Flood) -> Iterator[list[threading.Thread]]:
    attackers = [threading.Thread(target=_attack, args=(port, flood)) for _ in range(CONNECTIONS)]
    for one in attackers:
        one.start()
    try:
        yield attackers
    finally:
        for one in attackers:
            one.join()


def _attack(port: int, flood: Flood) -> None:
    """Sends the flood again and again, in a new connection where the server ended the old one."""
    ends_s = time.monotonic() + ATTACK_S
    while time.monotonic() < ends_s:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as attacker:
            attacker.settimeout(0.1)
            try:
                attacker.sendall(HELLO)
                for piece in flood():
                    attacker.sendall(piece)
                    if time.monotonic() > ends_s:
                        return
            except OSError:  # the server has closed it, or reads no more
                continue


def _answer_s(client: socket.socket, stream: int) -> float:
    """Seconds until a call on the connection is answered."""
    began_s = time.perf_counter()
    client.sendall(
        frame(HEADERS, END_HEADERS, stream, HEALTH) + frame(DATA, END_STREAM, stream, message(b""))
    )
    while True:
        head = _read(client, 9)
        _read(client, int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS and head[4] & END_STREAM and head[5:] == stream.to_bytes(4, "big"):
            return time.perf_counter() - began_s


def _read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(size - len(data))
        assert piece, "the server closed the connection"
        data += piece
    return data
