"""The request of a call: its messages, the bytes that wait, and the time it takes to arrive.

Requests may be compressed (gzip, deflate).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from grpc import StatusCode

from server.security.principal import ANONYMOUS, Principal
from server.transport.calls.calls_in_progress import BUSY_RETRY_S, CallsInProgress
from server.transport.calls.messages import MessageError, MessageReader, decompressed
from server.transport.http2.connection import CONNECTION_WINDOW, STREAM_WINDOW
from server.transport.http2.stream import Stream
from server.transport.metadata import RequestHead, Trailer
from server.transport.methods import OVERLOADED, REFUSAL, Abort

# Of incomplete messages; both far below the windows of streams and connections.
MAX_UNACKNOWLEDGED_BYTES = STREAM_WINDOW // 4
MAX_ALL_UNACKNOWLEDGED_BYTES = CONNECTION_WINDOW // 4

# For one message to arrive, and more for one that arrives at a fair pace.
RECEIVE_TIMEOUT_S = 60.0
MIN_BYTES_PER_S = 32 << 10


class RequestStream(Stream):
    """A stream that reads the messages of a request and counts the bytes that it holds."""

    __slots__ = ("_calls", "_head", "_principal", "_reader", "_unacknowledged", "_unread_bytes")

    _calls: CallsInProgress[Any]
    _head: RequestHead
    _principal: Principal  # when the call began; it holds the bytes
    _reader: MessageReader | None  # made if the body needs one
    _unread_bytes: int  # of messages, complete or not, that the method has not read
    _unacknowledged: int  # bytes by which the client's windows are smaller

    def overdue(self, now_s: float) -> str:
        """What is wrong if the request does not arrive in time; empty if it does."""
        started_s = None if self._reader is None else self._reader.started_s
        return "" if started_s is None else self._lateness(now_s - started_s)

    def _lateness(self, seconds: float) -> str:
        """What is wrong if a message has been arriving for so long; empty if nothing is."""
        limit_s = RECEIVE_TIMEOUT_S + self._unread_bytes / MIN_BYTES_PER_S
        if seconds <= limit_s:
            return ""
        return f"request: a message did not arrive within {limit_s:.0f} s"

    def received(self, data: bytes, is_last: bool) -> None:
        size = len(data)
        if not self._hold(size):
            self._unacknowledged += size
            self._acknowledge()
        elif self._reader is not None and not is_last and self._reader.keep_middle(data):
            self._unacknowledged += size
            if self._owes_much():
                self._acknowledge_unless_waiting()
            return
        else:
            self._read(data)
        if is_last:
            self.ended = True
            if self.open:
                self.request_ended()

    def request_ended(self) -> None:
        if self._reader is not None and self._reader.is_inside_message:
            self.refuse(StatusCode.INVALID_ARGUMENT, "request: ends in the middle of a message")
        else:
            self._messages_ended()

    def _forget_request(self) -> None:
        """Releases what the request holds."""
        if self._unread_bytes:
            self._release()
        if self._unacknowledged:
            self._acknowledge()
        if self._reader is not None:
            self._reader.clear()

    # --- for calls ---------------------------------------------------------------------------

    @abstractmethod
    def refuse(self, code: StatusCode, message: str, extra: Sequence[Trailer] = ()) -> None:
        """Ends the call with a status, in whatever state it is."""

    @abstractmethod
    def _refuse(self, code: StatusCode, abort: Abort) -> None:
        """Ends the call with the trailers of `abort`."""

    @abstractmethod
    def _add_message(self, message: bytes, compressed: bool) -> None:
        """Takes a whole message of the request."""

    @abstractmethod
    def _messages_ended(self) -> None:
        """Handles the end of a request after a whole message, or without any."""

    def _has_waiting_messages(self) -> bool:
        """Whether the client must wait until the method has read more."""
        return False

    def _acknowledge(self) -> None:
        """Lets the client send as many bytes as have come."""
        size, self._unacknowledged = self._unacknowledged, 0
        self.sender.consume(self.stream_id, size)

    def _release(self) -> None:
        """Forgets the unread bytes."""
        if self._principal.name == ANONYMOUS:
            self._calls.receiving_bytes -= self._unread_bytes
        else:
            self._calls.hold(self._principal, -self._unread_bytes)
        self._unread_bytes = 0

    def _hold(self, size: int) -> bool:
        """Counts `size` more unread bytes. Refuses the call if all calls hold too many."""
        try:
            self._count(size)
        except Abort as abort:
            self._refuse(StatusCode.RESOURCE_EXHAUSTED, abort)
            return False
        return True

    def _count(self, size: int) -> None:
        """Counts `size` more unread bytes. Raises Abort if all calls hold too many."""
        calls = self._calls
        self._unread_bytes += size
        if not calls.hold(self._principal, size):
            raise Abort(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{calls.receiving_bytes:,} bytes of requests are being received; at most "
                f"{calls.limits.receiving_bytes:,} are allowed, for all principals together",
                [("grpc-retry-pushback-ms", f"{BUSY_RETRY_S * 1e3:.0f}"), (REFUSAL, OVERLOADED)],
            )

    async def _inflated(self, message: bytes) -> bytes:
        """Inflates a message. Its bytes count as unread while they grow. Raises Abort."""
        calls, encoding = self._calls, self._head.encoding
        return await decompressed(
            calls.inflater, message, encoding, calls.limits.message_bytes, self._count
        )

    # --- private -----------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """Reads messages, or parts of them."""
        reader = self._reader
        if reader is None:
            limit_bytes = self._calls.limits.message_bytes
            reader = self._reader = MessageReader(self._head.encoding, limit_bytes)
        start, end = 0, len(data)
        try:
            while start < end and self.open:
                start, message = reader.read(data, start, end)
                if message is not None:
                    self._add_message(message, reader.compressed)
        except MessageError as error:
            self.refuse(error.code, str(error))
        self._unacknowledged += end
        if not self.open:
            self._acknowledge()
        elif not reader.is_inside_message or self._owes_much():
            self._acknowledge_unless_waiting()

    def _acknowledge_unless_waiting(self) -> None:
        if not self._has_waiting_messages():
            self._acknowledge()

    def _owes_much(self) -> bool:
        """Whether to acknowledge parts of a message; for each frame it would cost too much."""
        return (
            self._unacknowledged >= MAX_UNACKNOWLEDGED_BYTES
            or self._calls.receiving_bytes > MAX_ALL_UNACKNOWLEDGED_BYTES
        )
