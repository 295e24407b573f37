"""The TLS files are followed: sound new ones replace the old, others are refused."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from server.errors import CannotServe
from server.security.tls import TlsCredentials
from server.security.tls_files import TlsFiles
from tests.support.tls_files import HOST, Client, expired, issue_server, write

AUTHORITY = trustme.CA()
OLD, NEW = issue_server(AUTHORITY), issue_server(AUTHORITY)
CHECK_S = 0.01
WAIT_S = 20


def presented(context: ssl.SSLContext, client: Client) -> bytes:
    """The certificate that a client sees in a handshake with the context; DER."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    ours = client.context().wrap_bio(outgoing, incoming, server_hostname=HOST)
    for end in (ours, server, ours, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    certificate = ours.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def der(issued: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


class Followed:
    """Credentials that follow their files, and the events that they have logged."""

    def __init__(self, credentials: TlsCredentials, caplog: pytest.LogCaptureFixture) -> None:
        self.credentials = credentials
        self._caplog = caplog

    def uses(self, issued: trustme.LeafCert) -> bool:
        return presented(self.credentials.contexts.grpc, Client(AUTHORITY)) == der(issued)

    async def logged(self, event: str) -> logging.LogRecord:
        """Waits for an event."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for record in self._caplog.records:
                    if record.message == event:
                        self._caplog.clear()
                        return record
                await asyncio.sleep(CHECK_S)


Follow = Callable[[TlsFiles], AbstractAsyncContextManager[Followed]]


@pytest.fixture
def follow(caplog: pytest.LogCaptureFixture) -> Follow:
    caplog.set_level(logging.INFO, "server")

    async def following(files: TlsFiles) -> AsyncIterator[Followed]:
        credentials = TlsCredentials(files, requires_client=True, check_interval_s=CHECK_S)
        watching = asyncio.create_task(credentials.watch())
        yield Followed(credentials, caplog)
        watching.cancel()

    return asynccontextmanager(following)


async def test_files_that_are_written_again_are_taken_into_use(
    tmp_path: Path, follow: Follow
) -> None:
    files = write(tmp_path, OLD)
    async with follow(files) as followed:
        assert followed.uses(OLD)
        write(tmp_path, NEW)
        await followed.logged("tls_files_reloaded")
        assert followed.uses(NEW)


async def test_a_kubernetes_secret_is_followed(tmp_path: Path, follow: Follow) -> None:
    """The kubelet exchanges the link ..data, through which the files' own links lead."""
    for name, issued in (("..1", OLD), ("..2", NEW)):
        write(tmp_path / name, issued)
    (tmp_path / "..data").symlink_to("..1")
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).symlink_to(Path("..data") / name)
    async with follow(TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem", None)) as followed:
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await followed.logged("tls_files_reloaded")
        assert followed.uses(NEW)


async def test_a_renewal_by_certbot_is_followed(tmp_path: Path, follow: Follow) -> None:
    """It exchanges one link after the other, so that key and certificate differ for a moment."""
    for name, issued in (("1", OLD), ("2", NEW)):
        write(tmp_path / "archive" / name, issued)
    live = tmp_path / "live"
    live.mkdir()
    for name in ("cert.pem", "key.pem"):
        (live / name).symlink_to(tmp_path / "archive" / "1" / name)
    async with follow(TlsFiles(live / "cert.pem", live / "key.pem", None)) as followed:
        for name in ("cert.pem", "key.pem"):
            (live / name).unlink()
            (live / name).symlink_to(tmp_path / "archive" / "2" / name)
        await followed.logged("tls_files_reloaded")
        assert followed.uses(NEW)


def other_key(files: TlsFiles) -> None:
    files.key.write_bytes(NEW.private_key_pem.bytes())


def half_certificate(files: TlsFiles) -> None:
    files.certificate.write_bytes(files.certificate.read_bytes()[:100])


def no_key(files: TlsFiles) -> None:
    files.key.unlink()


def expired_pair(files: TlsFiles) -> None:
    write(files.certificate.parent, expired(AUTHORITY))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_key, "the key does not belong to the certificate"),
        (half_certificate, "contains no certificate"),
        (no_key, "No such file"),
        (expired_pair, "expired at"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_unusable_files_are_refused_and_the_old_ones_kept(
    tmp_path: Path, follow: Follow, spoil: Callable[[TlsFiles], None], says: str
) -> None:
    files = write(tmp_path, OLD)
    async with follow(files) as followed:
        spoil(files)
        record = await followed.logged("tls_files_refused")
        assert says in vars(record)["reason"]
        assert followed.uses(OLD)
        assert followed.credentials.is_refusing
        write(tmp_path, NEW)
        await followed.logged("tls_files_reloaded")
        assert followed.uses(NEW)
        assert not followed.credentials.is_refusing


async def test_going_back_to_the_files_in_use_ends_the_refusal(
    tmp_path: Path, follow: Follow
) -> None:
    files = write(tmp_path, OLD)
    async with follow(files) as followed:
        files.key.unlink()
        await followed.logged("tls_files_refused")
        write(tmp_path, OLD)
        await followed.logged("tls_files_reloaded")
        assert not followed.credentials.is_refusing


async def test_clients_of_a_ca_that_was_removed_are_refused(tmp_path: Path, follow: Follow) -> None:
    first, second = trustme.CA(), trustme.CA()
    client = Client(AUTHORITY, first.issue_cert("client.example"))
    files = write(tmp_path, OLD, client_ca=first)
    async with follow(files) as followed:
        presented(followed.credentials.contexts.grpc, client)
        write(tmp_path, OLD, client_ca=second)
        await followed.logged("tls_files_reloaded")
        with pytest.raises(ssl.SSLCertVerificationError):
            presented(followed.credentials.contexts.grpc, client)


def test_a_server_with_unusable_files_does_not_start(tmp_path: Path) -> None:
    files = write(tmp_path, OLD)
    other_key(files)
    with pytest.raises(CannotServe, match=f"{files.key}: the key does not belong"):
        TlsCredentials(files, requires_client=True)


def test_warnings_at_the_start_name_what_will_fail_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soon = datetime.now(UTC) + timedelta(days=3)
    files = write(tmp_path, issue_server(AUTHORITY, not_after=soon))
    files.key.chmod(0o644)
    TlsCredentials(files, requires_client=True)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "tls_key_world_readable",
        "tls_certificate_expires_soon",
    ]
