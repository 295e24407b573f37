"""A transport that encrypts: between a TCP transport and a protocol, after the TLS handshake."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from server.transport.http2.reading import TURN_BUDGET_S, ReadingTurns
from server.transport.tls.records import RecordQueue

RECORD_BYTES = 16_384  # what one TLS record can hold

# What OpenSSL gets or makes at a time. Its buffers keep the largest size they once had.
MAX_RECORDS, MAX_BYTES = 64, 32 << 10

# Records without data on one connection: changes of keys, empty ones. Clients change their keys
# after gigabytes, if at all. Each costs 20 to 30 us.
MAX_WITHOUT_DATA = 64

TLS_ERROR = "tls_error"  # the client's bytes are no TLS, or were changed on their way
TLS_FLOOD = "tls_flood"  # of records without data
REASONS = (TLS_ERROR, TLS_FLOOD)

# In place of a protocol whose connection is lost, so that the two don't refer to each other: their
# memory, 50 KB with OpenSSL's, would wait for the garbage collector.
NO_PROTOCOL = asyncio.Protocol()

Bytes = bytes | bytearray | memoryview


class TooManyRecords(Exception):
    """The client has sent too many records without data."""


class EncryptedTransport(asyncio.Transport, asyncio.Protocol):
    """The transport of `protocol`, and the protocol of the TCP transport `raw`.

    It costs less than the event loop's own TLS: one read and one write of OpenSSL for all data of a
    turn, and no exception where a record ends. Used on the event loop's thread only.
    """

    def __init__(
        self,
        raw: asyncio.Transport,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        protocol: asyncio.Protocol,
        turns: ReadingTurns,
        received: bytes,
        on_cut: Callable[[str], None],
    ) -> None:
        """`received` is what the client has sent behind its handshake.

        `on_cut` is called with a word if the client breaks TLS, and the connection ends.
        """
        super().__init__()
        self._raw = raw
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._protocol = protocol
        self._turns = turns
        self._records = RecordQueue(received)
        self._on_cut = on_cut
        self._without_data = 0  # records
        self._is_paused = False  # the protocol wants no data
        self._is_read_scheduled = False
        self._is_closing = False
        self._has_ended = False  # we send no more

    def start(self) -> None:
        """Takes over the connection."""
        self._raw.set_protocol(self)
        self._protocol.connection_made(self)
        self._read()

    # --- the TCP transport's calls -----------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._records.put(data)
        if not (self._is_paused or self._is_read_scheduled):
            self._read()

    def eof_received(self) -> bool:
        self._end_of_data()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closing = True
        protocol, self._protocol = self._protocol, NO_PROTOCOL
        protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    # --- the protocol's calls ----------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        if name == "sslcontext":
            return self._tls.context
        return self._raw.get_extra_info(name, default)

    def write(self, data: Bytes) -> None:
        if not data or self._is_closing or self._has_ended:
            return
        try:
            written = self._tls.write(data if len(data) <= MAX_BYTES else data[:MAX_BYTES])
            self._raw.write(self._outgoing.read())
            while written < len(data):
                piece = memoryview(data)[written : written + MAX_BYTES]
                written += self._tls.write(piece)
                self._raw.write(self._outgoing.read())
        except ssl.SSLError:
            self.abort()

    def writelines(self, list_of_data: Iterable[Bytes]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Sends what is buffered and TLS's own end; does not wait for the client's."""
        if not self._is_closing:
            self._write_end()
            self._is_closing = True
            self._raw.close()

    def abort(self) -> None:
        self._is_closing = True
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._is_closing or self._raw.is_closing()

    def pause_reading(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            if not (self._is_closing or self._is_read_scheduled):
                self._raw.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if self._is_closing:
                return
            if self._records.is_empty:
                self._raw.resume_reading()
            else:
                self._read_later()

    def is_reading(self) -> bool:
        return not (self._is_paused or self._is_closing)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._raw.get_write_buffer_limits()

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Sends TLS's own end, and that of TCP; the client may go on sending."""
        if not self._is_closing:
            self._write_end()
            self._raw.write_eof()

    def _write_end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            with suppress(ssl.SSLError):  # SSLWantReadError: the client's end has not come
                self._tls.unwrap()
            if self._outgoing.pending:
                self._raw.write(self._outgoing.read())

    # --- reading -----------------------------------------------------------------------------

    def _read(self) -> None:
        """Decrypts what has arrived and passes it on, for as long as a connection may read."""
        if self._is_closing:
            return
        chunks: list[bytes] = []
        has_ended, until_s = False, 0.0
        try:
            while records := self._records.pass_on(self._incoming, MAX_RECORDS, MAX_BYTES):
                has_ended = self._decrypt(records, chunks)
                if has_ended or self._records.is_empty:
                    break
                now_s = time.monotonic()
                until_s = until_s or now_s + TURN_BUDGET_S
                if now_s > until_s:
                    self._read_later()
                    break
        except ssl.SSLError:
            self._cut(TLS_ERROR)
            return
        except TooManyRecords:
            self._cut(TLS_FLOOD)
            return
        if self._outgoing.pending:  # an answer to a change of keys, for example
            self._raw.write(self._outgoing.read())
        if chunks:
            self._protocol.data_received(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if has_ended:
            self._end_of_data()

    def _decrypt(self, records: int, chunks: list[bytes]) -> bool:
        """Reads the records that OpenSSL has. Returns whether the client has ended TLS."""
        tls, incoming = self._tls, self._incoming
        before = len(chunks)
        try:
            while incoming.pending:
                chunk = tls.read(RECORD_BYTES)
                if not chunk:
                    return True
                chunks.append(chunk)
        except ssl.SSLWantReadError:
            pass  # the last record held no data
        with_data = len(chunks) - before
        if records > with_data:
            self._without_data += records - with_data
            if self._without_data > MAX_WITHOUT_DATA:
                raise TooManyRecords
        return False

    def _read_later(self) -> None:
        """Reads the rest in a later turn; no more arrives until then."""
        if not self._is_read_scheduled:
            self._is_read_scheduled = True
            self._raw.pause_reading()
            self._turns.add(self._read_rest)

    def _read_rest(self) -> None:
        self._is_read_scheduled = False
        if self._is_closing or self._is_paused:
            return
        self._read()
        if not (self._is_read_scheduled or self._is_paused or self._is_closing):
            self._raw.resume_reading()

    def _end_of_data(self) -> None:
        """The client sends no more. As on a plain connection, that ends it."""
        if not self._is_closing:
            self._protocol.eof_received()
            self.close()

    def _cut(self, reason: str) -> None:
        self._on_cut(reason)
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())  # the alert
        self._is_closing = True
        self._raw.close()
