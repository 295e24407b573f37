"""Ends of a connection: after its last bytes, at once, or with time for the client to read why."""

from __future__ import annotations

import asyncio
from typing import Any

from ngh2.enums import ErrorCode
from ngh2.exceptions import DenialOfServiceError

from server.transport.http2 import frame_limits
from server.transport.http2.frame_audit import FrameError
from server.transport.http2.stream import ResponseSender

LINGER_S = 1.0  # for a client that is cut to read the reason

EMPTY_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
GOAWAY_HEAD = b"\x07\0\0\0\0\0"  # type, flags, stream
ANY_STREAM = b"\x7f\xff\xff\xff"  # the last one that the server may have processed


class Closer:
    """Closes one connection, once."""

    def __init__(self, transport: Any, sender: ResponseSender) -> None:
        self._transport = transport
        self._sender = sender
        self._timer: asyncio.TimerHandle | None = None

    def close(self, last_bytes: bytes = b"") -> None:
        """Closes the connection after the buffered bytes and `last_bytes`."""
        if not self._sender.is_closed:
            self._sender.stop()
            if last_bytes:
                self._transport.write(last_bytes)
            self._transport.close()

    def cut(self, last_bytes: bytes) -> None:
        """Writes the last bytes and closes the connection, but gives the client time to read them.

        Bytes from the client that nobody reads would make the system reset the connection, and the
        client would not see the last bytes.
        """
        transport, sender = self._transport, self._sender
        if sender.is_closed:
            return
        sender.stop()
        if last_bytes:
            transport.write(last_bytes)
        if sender.is_writable and transport.can_write_eof():
            transport.write_eof()
            transport.resume_reading()
        else:
            transport.close()
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    def abort(self) -> None:
        """Closes the connection at once."""
        self._sender.stop()
        self._transport.abort()

    def closed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def fatal(error: Exception) -> tuple[str, bytes]:
    """The reason and the GOAWAY frame for an error that ends the HTTP/2 session."""
    code, reason = ErrorCode.PROTOCOL_ERROR, frame_limits.PROTOCOL_ERROR
    if isinstance(error, DenialOfServiceError):
        is_large = "header list" in str(error)
        reason = frame_limits.LARGE_HEADERS if is_large else frame_limits.FLOOD
        code = ErrorCode.ENHANCE_YOUR_CALM
    elif isinstance(error, FrameError):
        code = error.code
    return reason, goaway(code, str(error))


def goaway(code: ErrorCode, message: str) -> bytes:
    """A GOAWAY frame, for connections where the library cannot write one."""
    payload = ANY_STREAM + code.to_bytes(4, "big") + message.encode()[:200]
    return len(payload).to_bytes(3, "big") + GOAWAY_HEAD + payload
