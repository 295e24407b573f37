"""Certificate, key and client CAs: read from files, checked, made into TLS contexts."""

from __future__ import annotations

import re
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.security.certificate_dates import Validity, validity_of

MAX_FILE_BYTES = 1 << 20  # the CAs of all browsers together are 250 KB

# TLS 1.2: forward secrecy and authenticated encryption only. TLS 1.3 has nothing else.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
KEY = re.compile(rb"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----")
ENCRYPTED_KEY = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.M)

REASONS = {  # OpenSSL's -> ours
    "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
    "KEY_TYPE_MISMATCH": "the key does not belong to the certificate: they are of different kinds",
    "NO_CERTIFICATE_ASSIGNED": "the key does not belong to the certificate: they are of different "
    "kinds",
    "EE_KEY_TOO_SMALL": "the certificate's key is too short: at least RSA 2048 or P-256 is needed",
    "CA_KEY_TOO_SMALL": "a CA's key is too short: at least RSA 2048 or P-256 is needed",
    "CA_MD_TOO_WEAK": "a certificate is signed with a broken hash, such as SHA-1",
}


class TlsFilesError(Exception):
    """The files can't be used; the message names the option, the file and the reason."""


class TlsFilesChanged(TlsFilesError):
    """The files changed while they were read; they must be read again."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate and key are, and the CAs whose clients may connect, if clients must show
    certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def read(self) -> tuple[bytes, ...]:
        """The content of all files. Raises TlsFilesError."""
        named = [("tls_cert", self.certificate), ("tls_key", self.key)]
        if self.client_ca is not None:
            named.append(("tls_client_ca", self.client_ca))
        return tuple(_read(name, path) for name, path in named)

    def key_is_world_readable(self) -> bool:
        return bool(self.key.stat().st_mode & stat.S_IROTH)


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """A certificate with its key that were checked, and the CAs of clients."""

    files: TlsFiles
    contents: tuple[bytes, ...]  # of the files
    validity: Validity
    authorities: tuple[bytes, ...]  # DER

    def context(self, alpn: str, verify: ssl.VerifyMode) -> ssl.SSLContext:
        """A context for connections at one port, from the same content of the files.

        Raises TlsFilesError.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 1  # enough to resume; two cost twice as much
        if alpn:
            context.set_alpn_protocols([alpn])
        _load_pair(context, self.files)
        if self.authorities:
            _load_authorities(context, self.files, self.authorities)
            context.verify_mode = verify
        if self.files.read() != self.contents:
            raise TlsFilesChanged("the TLS files changed while they were read; start again")
        return context


def load(files: TlsFiles, contents: tuple[bytes, ...]) -> TlsMaterial:
    """Checks what `files.read` has read. Raises TlsFilesError."""
    chain = _certificates("tls_cert", files.certificate, contents[0])
    _check_key(files.key, contents[1])
    authorities: Sequence[bytes] = ()
    if files.client_ca is not None:
        authorities = _certificates("tls_client_ca", files.client_ca, contents[2])
        for authority in authorities:
            _validity("tls_client_ca", files.client_ca, authority)
    validity = _validity("tls_cert", files.certificate, chain[0])
    if validity.ends <= datetime.now(UTC):
        raise TlsFilesError(
            f"tls_cert: {files.certificate} expired at {validity.ends:%Y-%m-%d %H:%M:%S} UTC"
        )
    material = TlsMaterial(files, contents, validity, tuple(authorities))
    material.context("", ssl.CERT_NONE)
    return material


def _read(name: str, path: Path) -> bytes:
    try:
        if not path.is_file():
            path.stat()  # raises if there is none
            raise TlsFilesError(f"{name}: {path} is no file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TlsFilesError(f"{name}: can't read {path}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise TlsFilesError(f"{name}: {path} has more than {MAX_FILE_BYTES:,} bytes")
    return content


def _certificates(name: str, path: Path, content: bytes) -> list[bytes]:
    """The certificates of a file as DER."""
    found = CERTIFICATE.findall(content)
    if not found:
        what = "only a private key" if KEY.search(content) else "no certificate"
        raise TlsFilesError(f"{name}: {path} contains {what}; PEM is needed")
    try:
        return [ssl.PEM_cert_to_DER_cert(text.decode("ascii")) for text in found]
    except ValueError as error:
        raise TlsFilesError(f"{name}: {path} is damaged: {error}") from None


def _check_key(path: Path, content: bytes) -> None:
    if ENCRYPTED_KEY.search(content):
        raise TlsFilesError(
            f"tls_key: {path} is encrypted; store it without a passphrase, readable by the "
            "server's user only"
        )
    if not KEY.search(content):
        what = "only a certificate" if CERTIFICATE.search(content) else "no private key"
        raise TlsFilesError(f"tls_key: {path} contains {what}; PEM is needed")


def _validity(name: str, path: Path, der: bytes) -> Validity:
    try:
        return validity_of(der)
    except ValueError as error:
        raise TlsFilesError(f"{name}: {path} is damaged: {error}") from None


def _load_authorities(
    context: ssl.SSLContext, files: TlsFiles, authorities: Sequence[bytes]
) -> None:
    try:
        context.load_verify_locations(cadata=b"".join(authorities))
    except ssl.SSLError as error:
        raise TlsFilesError(f"tls_client_ca: {files.client_ca} is damaged: {error}") from None


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    def no_password() -> str:  # else OpenSSL asks for one on the terminal
        raise TlsFilesError(f"tls_key: {files.key} is encrypted")

    try:
        context.load_cert_chain(files.certificate, files.key, no_password)
    except (ssl.SSLError, OSError) as error:
        known = REASONS.get(getattr(error, "reason", None) or "")
        reason = known or f"OpenSSL can't use them: {error}"
        raise TlsFilesError(
            f"tls_cert, tls_key: {files.certificate} and {files.key}: {reason}"
        ) from None
