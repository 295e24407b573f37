"""Certificates of a test's server and clients, and grpcio's server with TLS."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import trustme

from convserve_client import TlsOptions


@dataclass(frozen=True)
class Files:
    """PEM files of one certificate."""

    cert: str
    key: str

    @property
    def pair(self) -> tuple[bytes, bytes]:
        return Path(self.key).read_bytes(), Path(self.cert).read_bytes()


class Authority:
    """A CA that writes certificates to files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._ca = trustme.CA()
        self.pem = self._ca.cert_pem.bytes()
        self.file = str(folder / f"{name}.pem")
        Path(self.file).write_bytes(self.pem)

    def issue(self, *names: str, **options: Any) -> Files:
        leaf = self._ca.issue_cert(*names, **options)
        stem = f"{self._name}-{names[0].replace('/', '-')}"
        cert, key = self._folder / f"{stem}.crt", self._folder / f"{stem}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return Files(str(cert), str(key))

    def issue_expired(self, *names: str) -> Files:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        return self.issue(*names, not_before=now - 20 * day, not_after=now - day)


def credentials(files: Files, client_ca: bytes | None = None) -> grpc.ServerCredentials:
    """For grpcio's server; with `client_ca` it requires a certificate of the client."""
    return grpc.ssl_server_credentials([files.pair], client_ca, client_ca is not None)


def client_tls(authority: Authority, files: Files | None = None, **options: Any) -> TlsOptions:
    if files is not None:
        options |= {"cert_file": files.cert, "key_file": files.key}
    return TlsOptions(ca_file=authority.file, **options)
