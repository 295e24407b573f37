"""TLS of a client: its files, for grpcio and for Python's own sockets."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from socket import socket

import grpc

HTTP2 = "h2"  # name of HTTP/2 in the TLS handshake (ALPN)

# Bundles of the CAs that a system trusts, for grpcio, which would trust a list of its own: Debian,
# Fedora, OpenSUSE, Alpine and macOS.
SYSTEM_CAS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """TLS for a connection to the server. All files are PEM.

    The files are checked at once: raises ValueError with the name of the file. A client reads them
    when it connects for the first time, and again if they have changed when a connection fails.
    """

    ca_file: str | PathLike[str] | None = None  # CAs to trust; None: those of the system
    cert_file: str | PathLike[str] | None = None  # the client's certificate, for servers with mTLS
    key_file: str | PathLike[str] | None = None  # its private key, without a passphrase
    server_name: str = ""  # in the server's certificate, if it is not the host of the target

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            given, missing = (
                ("cert_file", "key_file") if self.cert_file else ("key_file", "cert_file")
            )
            raise ValueError(f"{given} is given without {missing}; a certificate needs both")
        ssl_context(self)


class _Context(ssl.SSLContext):
    """Checks the `server_name`, if there is one, instead of the host that was connected to."""

    server_name = ""

    def wrap_socket(  # urllib calls this; it knows only the host of the URL
        self,
        sock: socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        return super().wrap_socket(
            sock,
            server_side,
            do_handshake_on_connect,
            suppress_ragged_eofs,
            self.server_name or server_hostname,
            session,
        )


def ssl_context(options: TlsOptions) -> ssl.SSLContext:
    """A context that checks the server's certificate and asks for HTTP/2. Raises ValueError."""
    context = https_context(options)
    context.set_alpn_protocols([HTTP2])
    return context


def https_context(options: TlsOptions) -> ssl.SSLContext:
    """A context that checks the server's certificate. Raises ValueError."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = options.server_name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_cas(context, options)
    _load_certificate(context, options)
    return context


def channel_credentials(options: TlsOptions) -> grpc.ChannelCredentials:
    """The same for grpcio. Raises ValueError."""
    ssl_context(options)  # its messages are better than grpcio's
    roots = _read(options.ca_file) if options.ca_file else _system_cas()
    if options.cert_file and options.key_file:
        key, chain = _read(options.key_file), _read(options.cert_file)
        return grpc.ssl_channel_credentials(roots, key, chain)
    return grpc.ssl_channel_credentials(roots)


def version_of(options: TlsOptions) -> object:
    """A value that differs after one of the files has changed."""
    return tuple(
        _stamp(name) for name in (options.ca_file, options.cert_file, options.key_file) if name
    )


def _stamp(name: str | PathLike[str]) -> tuple[int, int, int] | None:
    try:
        found = Path(name).stat()  # follows links, as Kubernetes replaces them
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _load_cas(context: ssl.SSLContext, options: TlsOptions) -> None:
    if not options.ca_file:
        context.load_default_certs()
        return
    name = fspath(options.ca_file)
    try:
        context.load_verify_locations(cadata=_read(name).decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ssl.SSLError | UnicodeDecodeError):
            raise ValueError(f"CA file {name} holds no certificate in PEM format") from None
        raise


def _load_certificate(context: ssl.SSLContext, options: TlsOptions) -> None:
    if not options.cert_file or not options.key_file:
        return
    cert, key = fspath(options.cert_file), fspath(options.key_file)
    for name in (cert, key):
        _read(name)
    try:
        # Without a password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"the key in {key} does not belong to the certificate in {cert}"
        elif "ENCRYPTED" in _read(key).decode("ascii", "replace"):
            why = f"the key in {key} has a passphrase; give a key without one"
        else:
            why = f"{cert} and {key} must hold a certificate and its private key in PEM format"
        raise ValueError(why) from None


def _read(name: str | PathLike[str]) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"{fspath(name)} cannot be read: {error.strerror}") from None


def _system_cas() -> bytes | None:
    """The system's CAs in one text; None if there is no such file: grpcio's own list."""
    found = ssl.get_default_verify_paths().cafile
    for name in (found, *SYSTEM_CAS):
        if name and Path(name).is_file():
            return _read(name)
    return None
