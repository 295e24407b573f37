"""The load generator's own transport speaks TLS, and says why a connection fails."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from convserve_client import ServerUnreachable, TlsError
from convserve_client.loadgen.wire import channel as channel_module
from convserve_client.loadgen.wire.channel import Channel, call_and_wait
from convserve_client.security.access import Access
from tests.clients.security.certificates import Authority, client_tls, credentials
from tests.clients.wire.peers import ECHO, TIMEOUT_S, status_of


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


@asynccontextmanager
async def echo_server(tls: grpc.ServerCredentials | None) -> AsyncIterator[tuple[str, list[Any]]]:
    """Target of grpcio's server, and the metadata of its calls."""
    heard: list[Any] = []

    async def echo(data: bytes, context: Any) -> bytes:
        heard.append(dict(context.invocation_metadata()))
        return data

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("test", {"Echo": handler})]
    )
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    await server.start()
    try:
        async with asyncio.timeout(60):
            yield f"127.0.0.1:{port}", heard
    finally:
        await server.stop(None)


@asynccontextmanager
async def server_that_says(greeting: bytes) -> AsyncIterator[str]:
    """Target of a server that sends these bytes to everyone, and keeps the connection open."""
    writers = []

    def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(greeting)

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.close()


async def connect_and_fail(target: str, access: Access) -> ServerUnreachable:
    channel = Channel(target, ECHO, access)
    with pytest.raises(ServerUnreachable) as failure:
        await channel.connect()
    await channel.close()
    return failure.value


async def test_large_and_concurrent_calls_work_over_tls(authority: Authority) -> None:
    tls = client_tls(authority)
    messages = [bytes([number]) * size for number, size in enumerate([0, 1, 70_000, 1 << 20] * 5)]
    async with echo_server(credentials(authority.issue("127.0.0.1"))) as (target, heard):
        channel = Channel(target, ECHO, Access(tls=tls, token="cs_me_123"))
        await channel.connect()
        calls = await asyncio.gather(*(call_and_wait(channel, one, TIMEOUT_S) for one in messages))
        await channel.close()
    assert [call.answer for call in calls] == messages
    assert {one["authorization"] for one in heard} == {"Bearer cs_me_123"}


async def test_client_certificate_and_server_name(authority: Authority) -> None:
    required = credentials(authority.issue("models.example.org"), authority.pem)
    tls = client_tls(authority, authority.issue("client"), server_name="models.example.org")
    async with echo_server(required) as (target, _):
        channel = Channel(target, ECHO, Access(tls=tls))
        await channel.connect()
        assert (await call_and_wait(channel, b"word", TIMEOUT_S)).answer == b"word"
        await channel.close()


async def test_certificates_that_do_not_fit_fail_at_once(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "other-ca")
    files, expired = authority.issue("127.0.0.1"), authority.issue_expired("127.0.0.1")
    for served, tls, said in (
        (files, client_tls(stranger), f"not signed by a CA in {stranger.file}"),
        (files, client_tls(authority, server_name="other.org"), "not have the name other.org"),
        (expired, client_tls(authority), "has expired"),
    ):
        async with echo_server(credentials(served)) as (target, _):
            error = await connect_and_fail(target, Access(tls=tls))
        assert type(error) is TlsError
        assert said in str(error)
        assert str(error).count(target) == 1


async def test_a_server_that_requires_a_certificate_says_so(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_TIMEOUT_S", 3.0)
    required = credentials(authority.issue("127.0.0.1"), authority.pem)
    async with echo_server(required) as (target, _):
        error = await connect_and_fail(target, Access(tls=client_tls(authority)))
    assert "requires a certificate of the client" in str(error)


async def test_plaintext_and_tls_are_told_apart(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_TIMEOUT_S", 3.0)
    async with echo_server(None) as (target, _):
        error = await connect_and_fail(target, Access(tls=client_tls(authority)))
        assert f"{target} does not speak TLS" in str(error)
    async with echo_server(credentials(authority.issue("127.0.0.1"))) as (target, _):
        error = await connect_and_fail(target, Access())
        assert "expects TLS" in str(error)


async def test_a_server_without_http2_is_refused(authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = authority.issue("127.0.0.1")
    context.load_cert_chain(files.cert, files.key)
    async with await asyncio.start_server(
        lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context
    ) as server:
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        error = await connect_and_fail(target, Access(tls=client_tls(authority)))
    assert "speaks TLS but not HTTP/2" in str(error)


@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers in HTTP/1.1: use TLS if"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "expects TLS"),
    ],
)
async def test_other_protocols_are_recognised_at_once(greeting: bytes, said: str) -> None:
    async with server_that_says(greeting) as target:
        error = await connect_and_fail(target, Access())
    assert said in str(error)


async def test_a_call_says_why_there_is_no_connection(authority: Authority) -> None:
    async with server_that_says(b"HTTP/1.1 200 OK\r\n") as target:
        channel = Channel(target, ECHO, Access(tls=client_tls(authority)))
        call = await call_and_wait(channel, b"", TIMEOUT_S)
        assert status_of(call) == "UNAVAILABLE"
        assert f"{target} does not speak TLS" in call.message
        await channel.close()
