"""Floods of TLS handshakes, on a server that speaks TLS. None of them is ever completed."""

from __future__ import annotations

import ssl
from contextlib import suppress

from tests.transport.attacks.attack import Attack, Pieces
from tests.transport.attacks.floods.connections import bytes_of, closed, silent


def client_hello() -> bytes:
    """What a client sends first; the server answers with a signature."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = client_hello()
BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)
EMPTY_RECORD = b"\x16\x03\x01\x00\x00"


def hello_unanswered() -> Pieces:
    """The server computes, then waits in vain."""
    yield HELLO


def hello_and_garbage() -> Pieces:
    """The server computes, then ends the connection; so it computes again at once."""
    yield HELLO + BAD_RECORD


def empty_records() -> Pieces:
    yield EMPTY_RECORD * 1000


def plaintext() -> Pieces:
    yield b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


FLOODS = (
    Attack("tls-hello-and-close", closed(HELLO, 0.01), connections=64, tls=True),
    Attack("tls-silent", silent, connections=1_500, tls=True),
    Attack("tls-hello-and-garbage", hello_and_garbage, connections=50, tls=True),
    Attack("tls-hello-unanswered", hello_unanswered, connections=1_000, tls=True),
    Attack("tls-hello-dripped", lambda: bytes_of(HELLO, 0.002), connections=200, tls=True),
    Attack("tls-empty-records", empty_records, connections=50, tls=True),
    Attack("tls-of-plaintext", plaintext, connections=50, tls=True),
    Attack("tls-http-hello-and-garbage", hello_and_garbage, port="http", connections=50, tls=True),
)
