"""One connection from its first byte to the end of its TLS handshake."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from server.security.peer import address_of
from server.transport.connection_limits import peer_key
from server.transport.http2.reading import ReadingTurns
from server.transport.tls.encrypted_transport import EncryptedTransport
from server.transport.tls.records import HEAD_BYTES, MAX_RECORD_BYTES, record_bytes
from server.transport.tls.turns import HandshakeTurns, Handshaking

HANDSHAKE_RECORD = 0x16

# The longest honest handshake needs five: TLS 1.2, with a certificate of the client. A client may
# use more, for large certificates.
MAX_HANDSHAKE_RECORDS = 64

MakeProtocol = Callable[[], asyncio.Protocol]
Encrypt = Callable[[MakeProtocol], asyncio.Protocol]  # puts TLS before a protocol


class Outcome(Enum):
    """How a handshake ended."""

    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    REFUSED = "refused"  # too many are in progress
    NOT_TLS = "not_tls"
    WRONG_PROTOCOL = "wrong_protocol"  # by ALPN


class HandshakeError(Exception):
    """The client does what OpenSSL would allow; the message says what."""


TOO_MANY = "too many handshakes are in progress"


@dataclass(frozen=True, slots=True)
class TlsPort:
    """What the handshakes at one port have in common."""

    context: Callable[[], ssl.SSLContext]  # for the next connection
    alpn: str  # protocol that a client must offer; empty if it need not offer any
    not_tls: Callable[[bytes], bytes]  # answer for a client whose first bytes are not TLS
    wrong_protocol: bytes  # answer, encrypted, for a client without `alpn`
    timeout_s: float
    is_trusted: Callable[[str], bool]  # whether a host has no limits of its own
    reading: ReadingTurns  # of connections whose handshake is done
    cut: Callable[[str, str], None]  # host and reason, after the handshake
    ended: Callable[[Outcome, str, str], None]  # with the peer's host and the reason


class Handshake(Handshaking, asyncio.Protocol):
    """Answers a client's handshake, then gives the connection to the protocol that `make` makes.

    Only whole records count as progress: a client that sends a byte at a time costs one step.
    """

    def __init__(self, port: TlsPort, turns: HandshakeTurns, make: MakeProtocol) -> None:
        self._port = port
        self._turns = turns
        self._make = make
        self._raw: Any = None
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._received = bytearray()
        self._complete = 0  # bytes of whole records at the start of `_received`
        self._records = b""  # for the next step; then those behind the handshake
        self._record_count = 0
        self._is_busy = False  # ready to compute, or computing
        self.is_over = False
        self._is_done = False
        self._error = ""  # why it failed
        self._timer: asyncio.TimerHandle | None = None

    # --- the TCP transport's calls -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = transport
        self._host = address_of(transport)[0]
        self.peer = peer_key(self._host)
        self.is_trusted = self._port.is_trusted(self._host)
        if not self._turns.enter(self):
            self.is_over = True
            self._port.ended(Outcome.REFUSED, self._host, TOO_MANY)
            self._raw.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._port.timeout_s, self._time_out)

    def data_received(self, data: bytes) -> None:
        if self.is_over:
            return
        if not self._record_count and not self._received and data[0] != HANDSHAKE_RECORD:
            self._end(Outcome.NOT_TLS, "the client does not speak TLS", self._port.not_tls(data))
            return
        self._received += data
        if not self._find_records():
            self._end(Outcome.FAILED, "the client sent no TLS record")
        elif self._complete and not self._is_busy:
            self._is_busy = True
            self._records = bytes(self._received[: self._complete])
            del self._received[: self._complete]
            self._complete = 0
            self._raw.pause_reading()
            self._turns.ready(self)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.is_over:
            self._leave(Outcome.FAILED, "the client left during the handshake")

    # --- the turns' calls --------------------------------------------------------------------

    def step(self) -> None:
        try:
            if self._tls is None:
                context = self._port.context()
                self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
            self._handle_records(self._tls)
        except Exception as error:  # all of it ends this connection, and nothing else
            # Not the exception: its traceback refers to this object, which would stay in memory.
            self._error = reason_of(error)

    def step_done(self) -> None:
        if self.is_over:
            return
        self._is_busy = False
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())
        if self._error:
            self._end(Outcome.FAILED, self._error)
        elif self._is_done:
            self._finish()
        else:
            self._turns.wait(self)
            self._raw.resume_reading()

    def evict(self) -> None:
        self._leave(Outcome.REFUSED, TOO_MANY)
        self._raw.abort()

    def _handle_records(self, tls: ssl.SSLObject) -> None:
        """Gives OpenSSL one record after the other, so that it gets none behind the handshake."""
        records, at = self._records, 0
        while at < len(records) and not self._is_done:
            end = at + record_bytes(records, at)
            self._incoming.write(records[at:end])
            at = end
            self._record_count += 1
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                self._is_done = True
            if self._record_count > MAX_HANDSHAKE_RECORDS:
                raise HandshakeError(f"it came in more than {MAX_HANDSHAKE_RECORDS} records")
        self._records = records[at:]

    # --- ends --------------------------------------------------------------------------------

    def _find_records(self) -> bool:
        """Updates `_complete`. False if the bytes can't be records."""
        received = self._received
        while len(received) >= self._complete + HEAD_BYTES:
            size = record_bytes(received, self._complete)
            if size > MAX_RECORD_BYTES:
                return False
            if self._complete + size > len(received):
                break
            self._complete += size
        return True

    def _time_out(self) -> None:
        self._leave(Outcome.TIMED_OUT, f"took more than {self._port.timeout_s:g} s")
        self._raw.abort()

    def _end(self, outcome: Outcome, reason: str, answer: bytes = b"") -> None:
        self._leave(outcome, reason)
        if answer:
            self._raw.write(answer)
        self._raw.close()

    def _leave(self, outcome: Outcome, reason: str) -> None:
        self.is_over = True
        self._turns.leave(self)
        if self._timer is not None:
            self._timer.cancel()
        self._port.ended(outcome, self._host, reason)

    def _finish(self) -> None:
        assert self._tls is not None
        is_wrong = self._port.alpn not in ("", self._tls.selected_alpn_protocol())
        reason = f"the client did not offer {self._port.alpn} by ALPN" if is_wrong else ""
        self._leave(Outcome.WRONG_PROTOCOL if is_wrong else Outcome.DONE, reason)
        behind = self._records + self._received
        protocol = asyncio.Protocol() if is_wrong else self._make()
        encrypted = EncryptedTransport(
            raw=self._raw,
            tls=self._tls,
            incoming=self._incoming,
            outgoing=self._outgoing,
            protocol=protocol,
            turns=self._port.reading,
            received=behind,
            on_cut=partial(self._port.cut, self._host),
        )
        self._raw.resume_reading()
        encrypted.start()
        if is_wrong:
            encrypted.write(self._port.wrong_protocol)
            encrypted.close()


def reason_of(error: Exception) -> str:
    """Why a handshake failed, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return REASONS.get(error.reason, error.reason.lower().replace("_", " "))
    return str(error) if isinstance(error, HandshakeError) else f"{type(error).__name__}: {error}"


REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client sent no certificate",
    "UNSUPPORTED_PROTOCOL": "the client speaks no TLS 1.2 or 1.3",
    "NO_SHARED_CIPHER": "the client offers none of the cipher suites",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not trust the server's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client refuses the server's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client refuses the server's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the client finds the server's certificate expired",
    "HTTP_REQUEST": "the client does not speak TLS",
}
