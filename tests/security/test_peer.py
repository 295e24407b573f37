"""The peer of a connection, for every kind of socket."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from pathlib import Path

import pytest
import trustme
import uvloop
from cryptography.x509 import DNSName, UniformResourceIdentifier

from server.security.peer import Peer, PeerCertificate, certificate_of, peer_of
from tests.support.tls_files import issue


async def accepted(listener: socket.socket) -> Peer:
    """The peer of the connection that waits in the listener's queue."""
    loop = asyncio.get_running_loop()
    seen: asyncio.Future[Peer] = loop.create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.close()
            seen.set_result(peer_of(transport))

    if listener.family == socket.AF_UNIX:
        server = await loop.create_unix_server(Server, sock=listener)
    else:
        server = await loop.create_server(Server, sock=listener)
    peer = await seen
    server.close()
    return peer


def run(listener: socket.socket, *, on_uvloop: bool) -> Peer:
    return uvloop.run(accepted(listener)) if on_uvloop else asyncio.run(accepted(listener))


def listening(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    listener = socket.socket(family)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(address)
    listener.listen()
    return listener


@pytest.mark.parametrize("on_uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("family", "bind", "connect"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::", "127.0.0.1"),  # arrives as ::ffff:127.0.0.1
        (socket.AF_INET6, "::1", "::1"),
    ],
    ids=["ipv4", "ipv4-at-ipv6", "ipv6"],
)
def test_a_tcp_peer_has_its_plain_address(
    family: socket.AddressFamily, bind: str, connect: str, on_uvloop: bool
) -> None:
    listener = listening(family, (bind, 0))
    with socket.create_connection((connect, listener.getsockname()[1])):
        peer = run(listener, on_uvloop=on_uvloop)
    assert peer == Peer(connect, True, None)


@pytest.mark.parametrize("on_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_a_peer_at_a_unix_socket_is_local(tmp_path: Path, on_uvloop: bool) -> None:
    path = str(tmp_path / "socket")
    listener = listening(socket.AF_UNIX, path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        peer = run(listener, on_uvloop=on_uvloop)
    assert peer == Peer("unix", True, None)


def test_a_peer_that_has_left_is_not_taken_for_a_local_one() -> None:
    """Its address is unknown under uvloop, and a rule for local peers must not apply."""
    listener = listening(socket.AF_INET, ("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # sends a reset
    peer = run(listener, on_uvloop=True)
    assert peer == Peer("", False, None)


def test_a_certificate_has_its_subject_and_its_alternative_names() -> None:
    authority = trustme.CA()
    names = DNSName("edge.example"), UniformResourceIdentifier("spiffe://example/ns/web")
    issued = issue(authority, "edge", *names)
    server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("server.example").configure_cert(server_context)
    server_context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server_context)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    issued.configure_cert(client_context)
    authority.configure_trust(client_context)
    at_server = server_context.wrap_bio(client, server, server_side=True)
    at_client = client_context.wrap_bio(server, client, server_hostname="server.example")
    for end in (at_client, at_server, at_client, at_server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert certificate_of(at_server.getpeercert()) == PeerCertificate(
        common_name="edge", dns_names=("edge.example",), uris=("spiffe://example/ns/web",)
    )


def test_a_subject_with_two_common_names_has_none() -> None:
    """A rule for one of the two must not match by chance."""
    fields = {"subject": ((("commonName", "alice"),), (("commonName", "bob"),))}
    assert certificate_of(fields) == PeerCertificate("", (), ())
    assert certificate_of({}) is None
