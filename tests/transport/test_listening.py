"""The server listens on IPv4, IPv6 and Unix sockets, and says plainly why it cannot."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import grpc
import httpx
import pytest
import uvloop

from server.api.stubs import classify_pb2 as pb
from server.app.lifecycle import running
from server.errors import CannotServe
from server.transport.listening import address_fields, listening, port_of
from tests.support.http2_peers import bare
from tests.support.server_process import local_settings
from tests.support.serving import SERVICE, Mirror, loading, publish, raw


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "clients"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("", ["127.0.0.1"]),
        ("localhost", ["localhost"]),
        pytest.param("::1", ["::1"], marks=needs_ipv6),
        pytest.param("[::1]", ["::1"], marks=needs_ipv6),
        pytest.param("::", ["::1", "127.0.0.1"], marks=needs_ipv6),
        pytest.param("[::]", ["::1", "127.0.0.1"], marks=needs_ipv6),
    ],
)
def test_a_host_may_be_an_address_of_either_kind_or_a_name(host: str, clients: list[str]) -> None:
    with listening(host, 0) as listener:
        port = listener.getsockname()[1]
        for client in clients:
            socket.create_connection((client, port), timeout=5).close()


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("0.0.0.0:8001", "without a port"),
        ("[::1]:8001", "without a port"),
        ("unix:/run/x.sock", "--unix-socket"),
        ("no-such-host.invalid", "can't listen on no-such-host.invalid:0"),
        ("x" * 80, "can't listen on xxx"),
        ("203.0.113.7", "can't listen on 203.0.113.7:0"),
    ],
)
def test_a_wrong_host_is_refused_with_the_reason(host: str, words: str) -> None:
    with pytest.raises(CannotServe) as caught, listening(host, 0):
        pass
    assert words in str(caught.value)


def test_dead_clients_are_noticed() -> None:
    """Idle connections stay open for an hour, so a client without power must not hold its own."""
    with listening("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_unix_socket_is_removed_at_the_end_and_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    assert path.exists()
    with listening("", 0, str(path)) as listener:
        assert port_of(listener) == 0
        assert address_fields(listener, "http_") == {"http_unix_socket": str(path)}
        with pytest.raises(CannotServe, match="another server"), listening("", 0, str(path)):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_wrong_path_of_a_unix_socket_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, words in (
        (tmp_path / "file", "is no socket"),
        (tmp_path / "missing" / "x.sock", "No such file or directory"),
        (tmp_path / ("x" * 120), "too long"),
    ):
        with pytest.raises(CannotServe, match=words), listening("", 0, str(path)):
            pass
    assert (tmp_path / "file").read_text() == "mine"


async def classify_on_unix_sockets(folder: Path) -> None:
    grpc_path, http_path = folder / "grpc.sock", folder / "http.sock"
    settings = local_settings(
        folder / "repo", unix_socket=str(grpc_path), http_unix_socket=str(http_path)
    )
    async with running(settings, loader=loading(Mirror)) as server:
        assert (server.port, server.http_port) == (0, 0)
        while not server.registry.is_ready:
            await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(f"unix:{grpc_path}") as channel:
            unary = channel.unary_unary(
                SERVICE + "Classify",
                request_serializer=pb.ClassifyRequest.SerializeToString,
                response_deserializer=pb.ClassifyResponse.FromString,
            )
            answer = await unary(raw(3), timeout=20)
            assert answer.model == "tiny"
        transport = httpx.AsyncHTTPTransport(uds=str(http_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/readyz")).status_code == 200
    assert not os.path.lexists(grpc_path)
    assert not os.path.lexists(http_path)


async def test_both_protocols_are_served_on_unix_sockets(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    await classify_on_unix_sockets(tmp_path)


def test_both_protocols_are_served_on_unix_sockets_by_uvloop(tmp_path: Path) -> None:
    publish(tmp_path / "repo")
    uvloop.run(classify_on_unix_sockets(tmp_path))


async def test_many_clients_may_connect_while_the_server_is_busy() -> None:
    """Otherwise the kernel drops some, and they wait for a second."""
    allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
    async with bare() as one:
        began_s = time.monotonic()
        clients = [
            socket.create_connection(("127.0.0.1", one.port), 20)
            for _ in range(min(allowed, 1_000))
        ]  # the server's loop accepts none of them meanwhile
        took_s = time.monotonic() - began_s
        for client in clients:
            client.close()
    assert took_s < 0.9
