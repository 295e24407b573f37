"""TLS files that can't be used are refused, and the message says why."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from server.security.tls_files import MAX_FILE_BYTES, TlsFiles, TlsFilesError, load
from tests.support.tls_files import expired, issue_server, write

AUTHORITY = trustme.CA()
ISSUED = issue_server(AUTHORITY)
OTHER = issue_server(AUTHORITY)


def refusal(files: TlsFiles) -> str:
    with pytest.raises(TlsFilesError) as caught:
        load(files, files.read())
    return str(caught.value)


def test_sound_files_tell_when_the_certificate_expires(tmp_path: Path) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=90)
    files = write(tmp_path, issue_server(AUTHORITY, not_after=end), client_ca=AUTHORITY)
    material = load(files, files.read())
    assert material.validity.ends == end
    assert len(material.authorities) == 1


def no_certificate(files: TlsFiles) -> None:
    files.certificate.unlink()


def folder_for_key(files: TlsFiles) -> None:
    files.key.unlink()
    files.key.mkdir()


def swapped(files: TlsFiles) -> None:
    certificate, key = files.certificate.read_bytes(), files.key.read_bytes()
    files.certificate.write_bytes(key)
    files.key.write_bytes(certificate)


def only_certificates(files: TlsFiles) -> None:
    files.key.write_bytes(files.certificate.read_bytes())


def other_key(files: TlsFiles) -> None:
    files.key.write_bytes(OTHER.private_key_pem.bytes())


def rsa_key(files: TlsFiles) -> None:
    issued = issue_server(AUTHORITY, key_type=trustme.KeyType.RSA)
    files.key.write_bytes(issued.private_key_pem.bytes())


def half_certificate(files: TlsFiles) -> None:
    files.certificate.write_bytes(files.certificate.read_bytes()[:300])


def damaged_certificate(files: TlsFiles) -> None:
    lines = files.certificate.read_bytes().splitlines()
    files.certificate.write_bytes(b"\n".join([lines[0], *lines[3:]]))


def half_key(files: TlsFiles) -> None:
    files.key.write_bytes(files.key.read_bytes()[:100])


def empty_ca(files: TlsFiles) -> None:
    assert files.client_ca is not None
    files.client_ca.write_bytes(b"")


def ca_that_is_no_certificate(files: TlsFiles) -> None:
    """Its dates can be read, but OpenSSL can't."""
    assert files.client_ca is not None
    der = bytearray(ssl.PEM_cert_to_DER_cert(files.client_ca.read_text()))
    signatures = list(re.finditer(rb"\x03[\x46-\x49]\x00\x30", der))
    der[signatures[-1].start()] = 0x04  # not a string of bits
    files.client_ca.write_text(ssl.DER_cert_to_PEM_cert(bytes(der)))


def expired_pair(files: TlsFiles) -> None:
    write(files.certificate.parent, expired(AUTHORITY))


def huge_key(files: TlsFiles) -> None:
    files.key.write_bytes(bytes(MAX_FILE_BYTES + 1))


def encrypted_key(files: TlsFiles) -> None:
    command = ["openssl", "pkcs8", "-topk8", "-in", str(files.key), "-passout", "pass:secret"]
    files.key.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_certificate, "tls_cert: can't read {cert}: No such file or directory"),
        (folder_for_key, "tls_key: {key} is no file"),
        (swapped, "tls_cert: {cert} contains only a private key; PEM is needed"),
        (only_certificates, "tls_key: {key} contains only a certificate; PEM is needed"),
        (other_key, "{cert} and {key}: the key does not belong to the certificate"),
        (rsa_key, "{cert} and {key}: the key does not belong to the certificate"),
        (half_certificate, "tls_cert: {cert} contains no certificate; PEM is needed"),
        (damaged_certificate, "tls_cert: {cert} is damaged: "),
        (half_key, "{cert} and {key}: OpenSSL can't use them: "),
        (empty_ca, "tls_client_ca: {ca} contains no certificate; PEM is needed"),
        (ca_that_is_no_certificate, "tls_client_ca: {ca} is damaged: "),
        (expired_pair, "tls_cert: {cert} expired at "),
        (huge_key, "tls_key: {key} has more than 1,048,576 bytes"),
        (encrypted_key, "tls_key: {key} is encrypted; store it without a passphrase"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_unusable_files_are_refused(
    tmp_path: Path, spoil: Callable[[TlsFiles], None], says: str
) -> None:
    files = write(tmp_path, ISSUED, client_ca=AUTHORITY)
    spoil(files)
    names = {"cert": files.certificate, "key": files.key, "ca": files.client_ca}
    assert says.format(**names) in refusal(files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_key_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, ISSUED)
    files.key.chmod(0)
    assert "Permission denied" in refusal(files)


def test_a_key_that_all_users_may_read_is_noticed(tmp_path: Path) -> None:
    files = write(tmp_path, ISSUED)
    assert not files.key_is_world_readable()
    files.key.chmod(0o644)
    assert files.key_is_world_readable()


def test_a_weak_key_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, ISSUED)
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=here"),
        *("-days", "2", "-keyout", str(files.key), "-out", str(files.certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert "the certificate's key is too short" in refusal(files)


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, ISSUED)
    contents = files.read()
    write(tmp_path, OTHER)
    with pytest.raises(TlsFilesError, match="changed while they were read"):
        load(files, contents)
