"""Floods of connections, and slow ones, on both ports."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.http2_frames import HELLO, OPEN_WINDOWS, PREFACE, call
from tests.transport.attacks.attack import (
    CLASSIFY,
    DIGIT,
    GET_MODEL,
    HEALTH_CHECK,
    Attack,
    Close,
    Pieces,
)

MANY = 1_500


def silent() -> Pieces:
    """Nothing at all."""
    yield from ()


def bytes_of(data: bytes, pause_s: float) -> Pieces:
    """The bytes one by one."""
    for start in range(len(data)):
        yield data[start : start + 1]
        yield pause_s


def greeted() -> Pieces:
    """A connection that says hello and waits."""
    yield HELLO


def garbage() -> Pieces:
    yield bytes(range(128, 256)) * 64


def hello_then_garbage() -> Pieces:
    yield HELLO + b"\xff" * 4096


def client_hello() -> Pieces:
    """The start of TLS, sent to a port that may not speak it."""
    yield bytes.fromhex("16030100c8010000c40303") + bytes(197)


def calls_unread() -> Pieces:
    """Large responses that are asked for and never read."""
    yield HELLO + OPEN_WINDOWS
    for stream in range(1, 2**31, 2):
        yield call(stream, GET_MODEL, b"\x0a\x06lenet5")


def one_call() -> Pieces:
    yield HELLO + call(1, HEALTH_CHECK)
    yield 0.05
    yield b"\xff" * 64  # ends the connection


def closed(*pieces: bytes | float) -> Callable[[], Pieces]:
    """Connections that send this, and are closed at once."""

    def made() -> Pieces:
        yield from pieces
        yield Close()

    return made


ONE_CALL = HELLO + call(1, CLASSIFY, DIGIT)

FLOODS = (
    Attack("connections-closed", closed(), connections=20),
    Attack("connections-closed-after-hello", closed(HELLO), connections=20),
    Attack(
        "connections-closed-after-call", closed(HELLO + call(1, CLASSIFY, DIGIT)), connections=20
    ),
    Attack("connections-silent", silent, connections=MANY),
    Attack("connections-greeted", greeted, connections=MANY),
    Attack("connections-of-garbage", garbage, connections=20),
    Attack("connections-of-hello-and-garbage", hello_then_garbage, connections=20),
    Attack("connections-of-one-call", one_call, connections=20),
    Attack("connections-of-tls", client_hello, connections=20),
    Attack("connections-with-slow-preface", lambda: bytes_of(PREFACE, 0.05), connections=500),
    Attack("responses-unread", calls_unread, connections=4, reads=False),
)
