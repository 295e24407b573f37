"""TLS of a server: credentials, handshakes, and what it puts before the protocols of both ports."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from server.security.tls import GRPC_PROTOCOL, TlsCredentials
from server.security.tls_files import TlsFiles
from server.settings import Settings
from server.telemetry.limited_log import LimitedLog
from server.telemetry.metrics import Metrics
from server.transport.connection_limits import GRPC, HTTP, ConnectionLimits
from server.transport.http2.reading import ReadingTurns
from server.transport.tls.encrypted_transport import REASONS
from server.transport.tls.handshake import Encrypt, Handshake, MakeProtocol, Outcome, TlsPort
from server.transport.tls.turns import HandshakeTurns

log = logging.getLogger(__name__)

# The rest of the machine is for calls. One thread makes 1,000 handshakes a second with P-256.
HANDSHAKE_THREADS = 1

NEEDS_TLS = "This port needs TLS: use https, or a TLS channel for gRPC.\n"
NEEDS_GRPC = (
    "This port speaks gRPC, over HTTP/2: the client must offer h2 by ALPN. REST, /metrics and "
    "/readyz are at the HTTP port.\n"
)


class Tls:
    """TLS of both ports. Used on the event loop's thread only."""

    def __init__(
        self,
        credentials: TlsCredentials,
        metrics: Metrics,
        settings: Settings,
        limits: ConnectionLimits,
    ) -> None:
        self._credentials = credentials
        self._metrics = metrics
        self._timeout_s = settings.tls_handshake_timeout_s
        self._turns = HandshakeTurns(settings.max_handshakes, HANDSHAKE_THREADS)
        self._limits = limits
        self._reading = ReadingTurns()
        self._log = LimitedLog(log)
        self._grpc = self._port(GRPC, lambda: credentials.contexts.grpc, GRPC_PROTOCOL)
        self._http = self._port(HTTP, lambda: credentials.contexts.http, "")
        metrics.read_tls(
            expires=lambda: credentials.expires.timestamp(),
            is_refusing=lambda: credentials.is_refusing,
        )

    def grpc(self, make: MakeProtocol) -> asyncio.Protocol:
        """A protocol for a new connection: the handshake, followed by the one that `make` makes."""
        return Handshake(self._grpc, self._turns, make)

    def http(self, make: MakeProtocol) -> asyncio.Protocol:
        return Handshake(self._http, self._turns, make)

    @property
    def requires_client(self) -> bool:
        """Whether clients must have a certificate."""
        return self._credentials.requires_client

    async def watch(self) -> None:
        """Follows the files until it is cancelled."""
        await self._credentials.watch()

    def close(self) -> None:
        """Ends the handshakes in progress."""
        self._turns.close()

    def _port(self, name: str, context: Callable[[], ssl.SSLContext], alpn: str) -> TlsPort:
        for outcome in Outcome:  # start at 0, so that rate() sees the first one
            self._metrics.tls_handshakes.labels(name, outcome.value)
        for reason in REASONS:
            self._metrics.connections_cut.labels(name, reason)
        return TlsPort(
            context=context,
            alpn=alpn,
            not_tls=plain_answer,
            wrong_protocol=http1_answer("505 HTTP Version Not Supported", NEEDS_GRPC),
            is_trusted=self._limits.is_trusted,
            reading=self._reading,
            cut=partial(self._cut, name),
            timeout_s=self._timeout_s,
            ended=partial(self._ended, name),
        )

    def _cut(self, port: str, host: str, reason: str) -> None:
        self._limits.cut(port, reason, host)

    def _ended(self, port: str, outcome: Outcome, host: str, reason: str) -> None:
        self._metrics.tls_handshakes.labels(port, outcome.value).inc()
        if outcome is not Outcome.DONE:
            fields = {"port_name": port, "outcome": outcome.value, "peer": host, "reason": reason}
            self._log.log(logging.WARNING, "tls_handshake_failed", fields)


class Encryption(NamedTuple):
    """How each port encrypts; None leaves it plain."""

    grpc: Encrypt | None
    http: Encrypt | None
    http_requires_certificate: bool  # of clients, for all but probes


def encryption_of(settings: Settings, tls: Tls | None) -> Encryption:
    if tls is None:
        return Encryption(None, None, False)
    if not settings.http_tls or settings.http_unix_socket:
        return Encryption(tls.grpc, None, False)
    return Encryption(tls.grpc, tls.http, tls.requires_client)


def tls_of(settings: Settings, metrics: Metrics, limits: ConnectionLimits) -> Tls | None:
    """None if the settings name no certificate. Raises CannotServe if its files can't be used."""
    if not settings.tls_cert:
        return None
    files = TlsFiles(
        Path(settings.tls_cert),
        Path(settings.tls_key),
        Path(settings.tls_client_ca) if settings.tls_client_ca else None,
    )
    credentials = TlsCredentials(files, requires_client=settings.tls_client != "optional")
    return Tls(credentials, metrics, settings, limits)


def plain_answer(first: bytes) -> bytes:
    """The answer for a client that speaks HTTP without TLS; empty for what is no HTTP.

    It is HTTP/1.1 for HTTP/2 too. With a GOAWAY of HTTP/2, gRPC's C core connects again until the
    call's deadline; this one fails the call at once, as UNAVAILABLE.
    """
    return http1_answer("400 Bad Request", NEEDS_TLS) if first[:1].isalpha() else b""


def http1_answer(status: str, text: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}\r\n"
        f"connection: close\r\n\r\n{text}"
    ).encode()
