"""A TLS server that sends back what it gets, behind the server's own handshakes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trustme

from server.security.tls import TlsCredentials
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.transport.connection_limits import ConnectionLimits
from server.transport.tls.ports import Tls
from tests.support.tls_files import HOST, Client, issue_server, write

AUTHORITY = trustme.CA()
ISSUED = issue_server(AUTHORITY)
TRUSTING = Client(AUTHORITY)
WAIT_S = 20


class Echo(asyncio.Protocol):
    """Sends data back, and reads nothing more while the client does not read."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.received = 0
        self.largest = 0  # bytes that arrived at once
        self.has_eof = False
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.largest = max(self.largest, len(data))
        self.transport.write(data)

    def eof_received(self) -> None:
        self.has_eof = True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class EchoServer:
    """What a test sees of the server."""

    def __init__(self, port: int, metrics: Metrics, protocols: list[Echo]) -> None:
        self.port = port
        self.protocols = protocols  # of connections whose handshake is done
        self._metrics = metrics

    def handshakes(self, outcome: str) -> float:
        labels = {"port": "grpc", "outcome": outcome}
        value = self._metrics.registry.get_sample_value("convserve_tls_handshakes_total", labels)
        assert value is not None
        return value

    def cut(self, reason: str) -> float | None:
        """Connections that were cut after their handshake."""
        name, labels = "convserve_connections_cut_total", {"port": "grpc", "reason": reason}
        return self._metrics.registry.get_sample_value(name, labels)

    async def ended(self, outcome: str, count: int = 1) -> None:
        """Waits until so many handshakes have had the outcome."""
        async with asyncio.timeout(WAIT_S):
            while self.handshakes(outcome) < count:
                await asyncio.sleep(0.005)

    def connect(self) -> socket.socket:
        """A TCP connection that has sent nothing."""
        return socket.create_connection((HOST, self.port))

    async def open(
        self, client: Client = TRUSTING, *alpn: str, **options: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A TLS connection."""
        context = client.context(*(alpn or ("h2",)))
        return await asyncio.open_connection(HOST, self.port, ssl=context, **options)


@asynccontextmanager
async def echo_server(
    folder: Path,
    *,
    make: Callable[[], Echo] = Echo,
    client_ca: trustme.CA | None = None,
    issued: trustme.LeafCert = ISSUED,
    **options: Any,
) -> AsyncIterator[EchoServer]:
    """Listens on a free port, with the handshakes of the gRPC port."""
    files = write(folder, issued, client_ca=client_ca)
    metrics = Metrics()
    limits = ConnectionLimits(
        1000, 1000, [], lambda port, reason: metrics.connections_cut.labels(port, reason).inc()
    )
    tls = Tls(
        TlsCredentials(files, requires_client=True),
        metrics,
        Settings(**options),
        limits,
    )
    protocols: list[Echo] = []

    def connect() -> Echo:
        protocols.append(make())
        return protocols[-1]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(tls.grpc, connect), HOST, 0)
    try:
        async with asyncio.timeout(60):
            yield EchoServer(server.sockets[0].getsockname()[1], metrics, protocols)
    finally:
        server.close()
        tls.close()
        for protocol in protocols:
            protocol.transport.abort()
        for protocol in protocols:
            await protocol.lost.wait()
