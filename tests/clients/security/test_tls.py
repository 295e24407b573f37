"""The library speaks TLS, and says in one sentence why a connection fails."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from convserve_client import (
    NO_RETRY,
    AsyncClient,
    Client,
    ServerUnreachable,
    TlsError,
    TlsOptions,
)
from convserve_client.security.tls import channel_credentials, ssl_context
from tests.clients.security.certificates import Authority, client_tls, credentials
from tests.support.scripted_classifier import EXPECTED_ANSWER, ScriptedClassifier, serving


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "other-ca")


async def test_calls_and_health_checks_work_over_tls(authority: Authority) -> None:
    service = ScriptedClassifier()
    await service.health.set("", 1)
    async with (
        serving(service, tls=credentials(authority.issue("127.0.0.1"))) as target,
        AsyncClient(target, tls=client_tls(authority)) as client,
    ):
        await client.wait_ready()
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER


async def test_a_client_without_an_event_loop_speaks_tls(authority: Authority) -> None:
    files = authority.issue("127.0.0.1")
    async with serving(ScriptedClassifier(), tls=credentials(files)) as target:

        def classify() -> object:
            with Client(target, tls=client_tls(authority)) as client:
                return client.classify(b"", model="small")

        assert await asyncio.to_thread(classify) == EXPECTED_ANSWER


async def test_the_server_name_is_checked_instead_of_the_host(authority: Authority) -> None:
    files = authority.issue("models.example.org")
    async with serving(ScriptedClassifier(), tls=credentials(files)) as target:
        tls = client_tls(authority, server_name="models.example.org")
        async with AsyncClient(target, tls=tls) as client:
            assert await client.classify(b"", model="small") == EXPECTED_ANSWER


async def test_a_client_shows_its_certificate(authority: Authority) -> None:
    files = credentials(authority.issue("127.0.0.1"), authority.pem)
    async with serving(ScriptedClassifier(), tls=files) as target:
        tls = client_tls(authority, authority.issue("spiffe-client"))
        async with AsyncClient(target, tls=tls) as client:
            assert await client.classify(b"", model="small") == EXPECTED_ANSWER


async def test_renewed_files_are_read_after_a_failed_connection(
    authority: Authority, stranger: Authority
) -> None:
    trusted = Path(stranger.file)
    tls = client_tls(stranger)
    server = credentials(authority.issue("127.0.0.1"))
    async with (
        serving(ScriptedClassifier(), tls=server) as target,
        AsyncClient(target, tls=tls) as client,
    ):
        with pytest.raises(TlsError):
            await client.classify(b"", model="small")
        trusted.write_bytes(authority.pem)
        with pytest.raises(TlsError):  # this failure shows that the file has changed
            await client.classify(b"", model="small")
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER
        trusted.write_text("no certificate")  # the connection goes on
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER


async def test_a_file_that_is_gone_when_the_client_connects_is_named(authority: Authority) -> None:
    tls = client_tls(authority)
    Path(authority.file).unlink()
    async with AsyncClient("127.0.0.1:1", tls=tls) as client:
        with pytest.raises(TlsError, match=r"ca\.pem cannot be read"):
            await client.is_serving()


async def failure_of(target: str, tls: TlsOptions | None) -> ServerUnreachable:
    async with AsyncClient(target, tls=tls) as client:
        with pytest.raises(ServerUnreachable) as failure:
            await client.classify(b"", model="small")
        with pytest.raises(type(failure.value)):
            await client.is_serving()
    return failure.value


async def test_a_certificate_of_another_ca_names_the_file_of_the_ca(
    authority: Authority, stranger: Authority
) -> None:
    async with serving(
        ScriptedClassifier(), tls=credentials(authority.issue("127.0.0.1"))
    ) as target:
        error = await failure_of(target, client_tls(stranger))
        assert type(error) is TlsError
        assert f"{target} is not signed by a CA in {stranger.file}" in str(error)
        by_default = await failure_of(target, TlsOptions())
        assert "the system's list" in str(by_default)
        async with AsyncClient(target, tls=client_tls(stranger)) as client:
            with pytest.raises(TlsError):  # at once: waiting does not help
                await client.wait_ready(timeout_s=30)


async def test_a_certificate_for_another_name_says_which_name_is_missing(
    authority: Authority,
) -> None:
    async with serving(
        ScriptedClassifier(), tls=credentials(authority.issue("example.org"))
    ) as target:
        error = await failure_of(target, client_tls(authority))
        assert type(error) is TlsError
        assert "does not have the name 127.0.0.1" in str(error)
        named = await failure_of(target, client_tls(authority, server_name="other.org"))
        assert "does not have the name other.org" in str(named)


async def test_an_expired_certificate_says_so(authority: Authority) -> None:
    files = authority.issue_expired("127.0.0.1")
    async with serving(ScriptedClassifier(), tls=credentials(files)) as target:
        error = await failure_of(target, client_tls(authority))
        assert type(error) is TlsError
        assert "has expired" in str(error)


async def test_tls_to_a_plaintext_port_says_so(authority: Authority) -> None:
    async with serving(ScriptedClassifier()) as target:
        error = await failure_of(target, client_tls(authority))
        assert type(error) is TlsError
        assert str(error).startswith(f"{target} does not speak TLS")


@pytest.mark.parametrize("with_certificate", [False, True])
async def test_a_connection_that_the_server_closes_gets_a_hint(
    authority: Authority, stranger: Authority, with_certificate: bool
) -> None:
    files = stranger.issue("client") if with_certificate else None
    required = credentials(authority.issue("127.0.0.1"), authority.pem)
    async with serving(ScriptedClassifier(), tls=required) as target:
        plaintext = await failure_of(target, None)
        assert "if the port expects TLS, use TLS" in str(plaintext)
        error = await failure_of(target, client_tls(authority, files))
        hint = f"certificate in {files.cert}" if files else "requires a certificate of the client"
        assert hint in str(error)


async def test_a_tls_port_of_another_protocol_says_so(authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = authority.issue("127.0.0.1")
    context.load_cert_chain(files.cert, files.key)
    async with await asyncio.start_server(
        lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context
    ) as server:
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncClient(target, tls=client_tls(authority), retry=NO_RETRY) as client:
            with pytest.raises(TlsError, match="speaks TLS but not HTTP/2"):
                await client.classify(b"", model="small")


def test_files_are_checked_at_once(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    files, other = authority.issue("client"), stranger.issue("client")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for options, said in (
        ({"ca_file": tmp_path / "none.pem"}, "none.pem cannot be read: No such file"),
        ({"ca_file": text}, "text.pem holds no certificate"),
        ({"cert_file": files.cert}, "cert_file is given without key_file"),
        ({"key_file": files.key}, "key_file is given without cert_file"),
        ({"cert_file": files.cert, "key_file": other.key}, "does not belong to the certificate"),
        ({"cert_file": text, "key_file": files.key}, "a certificate and its private key in PEM"),
    ):
        with pytest.raises(ValueError, match=said):
            TlsOptions(**options)


def test_a_key_with_a_passphrase_is_refused_without_asking(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = Authority(tmp_path, "ca").issue("client")
    key = serialization.load_pem_private_key(Path(files.key).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match=r"locked\.key has a passphrase"):
        TlsOptions(cert_file=files.cert, key_file=locked)


def test_without_a_ca_file_the_systems_cas_are_trusted() -> None:
    assert ssl_context(TlsOptions()).verify_mode is ssl.CERT_REQUIRED
    assert channel_credentials(TlsOptions())
