"""Certificates and keys in files, for servers and clients in tests."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.security.tls_files import TlsFiles

HOST = "127.0.0.1"


def issue_server(authority: trustme.CA, **options: Any) -> trustme.LeafCert:
    return authority.issue_cert(HOST, "localhost", **options)


def expired(authority: trustme.CA) -> trustme.LeafCert:
    return issue_server(authority, not_after=datetime.now(UTC) - timedelta(days=1))


def write(folder: Path, issued: trustme.LeafCert, client_ca: trustme.CA | None = None) -> TlsFiles:
    """cert.pem and key.pem, and ca.pem for the CA of clients, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = TlsFiles(
        folder / "cert.pem", folder / "key.pem", folder / "ca.pem" if client_ca else None
    )
    files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    files.key.write_bytes(issued.private_key_pem.bytes())
    files.key.chmod(0o600)
    if client_ca is not None and files.client_ca is not None:
        files.client_ca.write_bytes(client_ca.cert_pem.bytes())
    return files


@dataclass(frozen=True, slots=True)
class Client:
    """What a client has: the CA of servers that it trusts, and its certificate, if any."""

    trusts: trustme.CA
    certificate: trustme.LeafCert | None = None

    def context(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.trusts.configure_trust(context)
        if self.certificate is not None:
            self.certificate.configure_cert(context)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        key = chain = None
        if self.certificate is not None:
            key = self.certificate.private_key_pem.bytes()
            chain = b"".join(pem.bytes() for pem in self.certificate.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.trusts.cert_pem.bytes(), key, chain)


def options(files: TlsFiles) -> dict[str, Any]:
    """The server's settings for the files."""
    client_ca = "" if files.client_ca is None else str(files.client_ca)
    return {
        "tls_cert": str(files.certificate),
        "tls_key": str(files.key),
        "tls_client_ca": client_ca,
    }


def issue(authority: trustme.CA, common_name: str, *names: x509.GeneralName) -> trustme.LeafCert:
    """A certificate with names that trustme can't put in: URIs, as SPIFFE uses them."""
    signer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signing_key = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(signing_key, hashes.SHA256())
    return trustme.LeafCert(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
        [],
    )
