"""A TLS client whose records the test decides."""

from __future__ import annotations

import socket
import ssl

from tests.support.tls_files import HOST
from tests.transport.tls.echo_server import TRUSTING


class BlockingClient:
    """A TLS client whose records and pauses the test decides. Its methods block."""

    def __init__(self, port: int) -> None:
        self.tcp = socket.create_connection((HOST, port))
        self.tcp.settimeout(20)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = TRUSTING.context("h2")
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=HOST)
        while not self._handshake_is_done():
            self.tcp.sendall(self._outgoing.read())
            self._incoming.write(self.tcp.recv(65_536))

    def records(self, *parts: bytes) -> bytes:
        """Encrypted records, one for each part."""
        for part in parts:
            self.tls.write(part)
        return self._outgoing.read()

    def receive(self, size: int) -> bytes:
        """So many bytes; fewer if the server ends TLS before."""
        data = b""
        while len(data) < size:
            try:
                piece = self.tls.read(size - len(data))
                if not piece:
                    break
                data += piece
            except ssl.SSLWantReadError:
                self._incoming.write(self.tcp.recv(65_536))
        return data

    def _handshake_is_done(self) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True
