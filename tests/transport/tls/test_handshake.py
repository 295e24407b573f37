"""TLS handshakes: which are made, which are refused, and that refused ones hold nobody up."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from server.transport.tls.encrypted_transport import EncryptedTransport
from server.transport.tls.handshake import Handshake
from tests.support.tls_files import HOST, Client, issue_server
from tests.transport.tls.blocking_client import BlockingClient
from tests.transport.tls.echo_server import AUTHORITY, TRUSTING, EchoServer, echo_server


def client_hello(*alpn: str) -> bytes:
    """The first bytes of a client."""
    outgoing = ssl.MemoryBIO()
    tls = TRUSTING.context(*alpn).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def read_to_end(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    read = b""
    while True:
        try:
            data = await loop.sock_recv(connection, 65_536)
        except ConnectionResetError:
            return read
        if not data:
            return read
        read += data


async def echoes(server: EchoServer, client: Client = TRUSTING) -> bool:
    reader, writer = await server.open(client)
    writer.write(b"hello")
    answer = await reader.readexactly(5)
    writer.transport.abort()
    return answer == b"hello"


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)
async def test_tls_1_2_and_1_3_are_spoken(tmp_path: Path, version: ssl.TLSVersion) -> None:
    context = TRUSTING.context("h2")
    context.minimum_version = context.maximum_version = version
    async with echo_server(tmp_path) as server:
        _, writer = await asyncio.open_connection(HOST, server.port, ssl=context)
        tls = writer.get_extra_info("ssl_object")
        assert tls.version() == f"TLSv1.{version.value - ssl.TLSVersion.TLSv1_2.value + 2}"
        assert tls.selected_alpn_protocol() == "h2"
        assert "GCM" in tls.cipher()[0] or "CHACHA20" in tls.cipher()[0]
        writer.transport.abort()


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1], ids=["1.0", "1.1"]
)
async def test_older_versions_are_refused(tmp_path: Path, version: ssl.TLSVersion) -> None:
    context = TRUSTING.context("h2")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    async with echo_server(tmp_path) as server:
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await asyncio.open_connection(HOST, server.port, ssl=context)
        await server.ended("failed")


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA256", "AES128-GCM-SHA256"])
async def test_ciphers_without_forward_secrecy_or_authentication_are_refused(
    tmp_path: Path, cipher: str
) -> None:
    context = TRUSTING.context("h2")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(cipher)
    async with echo_server(tmp_path) as server:
        with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
            await asyncio.open_connection(HOST, server.port, ssl=context)
        await server.ended("failed")


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)
async def test_sessions_are_resumed(tmp_path: Path, version: ssl.TLSVersion) -> None:
    context = TRUSTING.context("h2")
    context.maximum_version = version

    def connect(port: int, session: ssl.SSLSession | None) -> tuple[bool | None, ssl.SSLSession]:
        with socket.create_connection((HOST, port)) as tcp:
            tls = context.wrap_socket(tcp, server_hostname=HOST, session=session)
            tls.sendall(b"hello")  # the ticket of TLS 1.3 comes with the first bytes
            assert tls.recv(5) == b"hello"
            reused, latest = tls.session_reused, tls.session
            tls.close()
        assert latest is not None
        return reused, latest

    async with echo_server(tmp_path) as server:
        reused, session = await asyncio.to_thread(connect, server.port, None)
        assert not reused
        reused, _ = await asyncio.to_thread(connect, server.port, session)
        assert reused


async def test_a_client_without_h2_gets_an_answer_that_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with echo_server(tmp_path) as server:
        reader, writer = await server.open(TRUSTING, "http/1.1")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 505 ")
        assert b"h2 by ALPN" in answer
        writer.transport.abort()
        assert server.handshakes("wrong_protocol") == 1
        assert not server.protocols
    assert "tls_handshake_failed" in caplog.messages


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"GET / HTTP/1.1\r\nhost: here\r\n\r\n", b"This port needs TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"This port needs TLS"),
        (b"\0\1\2\3", b""),
    ],
    ids=["http1", "http2", "noise"],
)
async def test_a_client_without_tls_is_told_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes, answer: bytes
) -> None:
    async with echo_server(tmp_path) as server:
        with server.connect() as connection:
            connection.sendall(sent)
            read = await read_to_end(connection)
        assert answer in read
        assert bool(answer) == bool(read)
        assert server.handshakes("not_tls") == 1
    [record] = [one for one in caplog.records if one.message == "tls_handshake_failed"]
    assert vars(record)["reason"] == "the client does not speak TLS"


async def test_many_failures_are_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with echo_server(tmp_path) as server:
        for _ in range(20):
            with server.connect() as connection:
                connection.sendall(b"\0")
        await server.ended("not_tls", 20)
    assert caplog.messages.count("tls_handshake_failed") < 5


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\xff\xff" + bytes(100),  # a record that is too long
        b"\x16\x03\x01\x00\x04" + b"\x01\xff\xff\xff" * 4,  # a message that is too long
        b"\x16\x03\x01\x00\x00" * 40,  # empty records
        client_hello("h2")[:-1] + b"\0" * 40,
    ],
    ids=["long-record", "long-message", "empty-records", "hello-and-noise"],
)
async def test_garbage_is_refused(tmp_path: Path, sent: bytes) -> None:
    async with echo_server(tmp_path) as server:
        with server.connect() as connection:
            connection.sendall(sent)
            await read_to_end(connection)
        assert server.handshakes("failed") == 1
        assert await echoes(server)


async def test_a_handshake_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async with echo_server(tmp_path, tls_handshake_timeout_s=0.2) as server:
        with server.connect() as silent, server.connect() as half:
            half.sendall(client_hello("h2")[:50])
            await asyncio.gather(read_to_end(silent), read_to_end(half))
        assert server.handshakes("timed_out") == 2


async def test_a_hello_that_drips_costs_nothing_before_it_is_complete(tmp_path: Path) -> None:
    hello = client_hello("h2")
    async with echo_server(tmp_path) as server:
        with server.connect() as dripping:
            dripping.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(len(hello)):
                dripping.sendall(hello[at : at + 1])
                if at % 50 == 0:
                    await asyncio.sleep(0.001)
            dripping.setblocking(False)
            answer = await asyncio.get_running_loop().sock_recv(dripping, 65_536)
            assert answer[0] == 0x16


async def test_a_handshake_in_too_many_parts_is_ended(tmp_path: Path) -> None:
    """Each record holds a byte of the hello, and would cost a step of OpenSSL."""
    hello = client_hello("h2")[5:]

    async def send_in_parts(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        for byte in hello:
            await loop.sock_sendall(connection, b"\x16\x03\x01\x00\x01" + bytes([byte]))
            await asyncio.sleep(0.002)

    async with echo_server(tmp_path) as server:
        with server.connect() as connection, pytest.raises(ConnectionError):
            await send_in_parts(connection)
        assert server.handshakes("failed") == 1


async def test_silent_connections_keep_nobody_out(tmp_path: Path) -> None:
    async with echo_server(tmp_path, max_handshakes=4) as server:
        silent = [server.connect() for _ in range(20)]
        await server.ended("refused", 18)  # one address may hold half of the places
        assert await echoes(server)
        for connection in silent:
            connection.close()
        await server.ended("failed", 1)


async def test_a_client_that_leaves_in_the_handshake_frees_its_place(tmp_path: Path) -> None:
    async with echo_server(tmp_path, max_handshakes=2) as server:
        for count in range(1, 6):
            with server.connect() as connection:
                connection.sendall(client_hello("h2"))
            await server.ended("failed", count)
        assert await echoes(server)


async def test_a_client_certificate_is_required_and_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clients, strangers = trustme.CA(), trustme.CA()
    async with echo_server(tmp_path, client_ca=clients) as server:
        assert await echoes(server, Client(AUTHORITY, clients.issue_cert("client.example")))
        for client in (TRUSTING, Client(AUTHORITY, strangers.issue_cert("client.example"))):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await echoes(server, client)
        await server.ended("failed", 2)
        assert len(server.protocols) == 1
    reasons = {vars(one)["reason"] for one in caplog.records if "reason" in vars(one)}
    assert "the client sent no certificate" in reasons


async def test_an_expired_client_certificate_is_refused(tmp_path: Path) -> None:
    clients = trustme.CA()
    past = datetime.now(UTC) - timedelta(days=1)
    late = Client(AUTHORITY, clients.issue_cert("client.example", not_after=past))
    async with echo_server(tmp_path, client_ca=clients) as server:
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await echoes(server, late)
        await server.ended("failed")


async def test_renegotiation_is_refused(tmp_path: Path) -> None:
    """OpenSSL's client asks for it with the line R."""
    async with echo_server(tmp_path) as server:
        command = ["openssl", "s_client", "-connect", f"{HOST}:{server.port}", "-tls1_2"]
        client = await asyncio.create_subprocess_exec(
            *command,
            *("-alpn", "h2"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        await server.ended("done")
        output, _ = await client.communicate(b"R\n")
        assert b"no renegotiation" in output


async def test_a_stopping_server_ends_handshakes(tmp_path: Path) -> None:
    async with echo_server(tmp_path) as server:
        connection = server.connect()
        connection.sendall(client_hello("h2"))
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_recv(connection, 65_536)
    assert await read_to_end(connection) is not None
    connection.close()


async def test_rsa_certificates_work_too(tmp_path: Path) -> None:
    issued = issue_server(AUTHORITY, key_type=trustme.KeyType.RSA)
    async with echo_server(tmp_path, issued=issued) as server:
        assert await echoes(server)


async def test_ended_connections_leave_nothing_for_the_garbage_collector(tmp_path: Path) -> None:
    """Each holds 50 KB, so that a flood of them would take memory until the next collection."""

    def left() -> list[object]:
        kinds = (Handshake, EncryptedTransport, ssl.SSLObject)
        # isinstance() would ask other objects, and some of torch's warn when they are asked.
        return [one for one in gc.get_objects() if type(one) in kinds]

    async with echo_server(tmp_path) as server:
        gc.collect()
        gc.disable()
        try:
            for count in range(1, 4):
                with server.connect() as connection:
                    connection.sendall(client_hello("h2") + b"\x17\x03\x03\x00\x40" + bytes(64))
                    await read_to_end(connection)
                await server.ended("failed", count)
                client = await asyncio.to_thread(BlockingClient, server.port)
                client.tcp.sendall(client.records())  # the end of its handshake
                await server.ended("done", count)
                client.tcp.close()
                await server.protocols.pop().lost.wait()
                del client
            async with asyncio.timeout(10):  # the handshake thread may still hold the last one
                while left():
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


@pytest.fixture(autouse=True)
def _levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server")
