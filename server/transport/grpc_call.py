"""A gRPC call on an HTTP/2 stream (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md).

Requests may be compressed (gzip, deflate). Responses are not compressed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Coroutine, Sequence
from typing import Any

from grpc import StatusCode

from server.security.caller import Caller
from server.transport.access import CallAccess
from server.transport.calls_in_progress import BUSY_RETRY_S, CallsInProgress
from server.transport.http2.connection import CONNECTION_WINDOW, STREAM_WINDOW
from server.transport.http2.stream import ResponseSender, Stream
from server.transport.messages import MessageError, MessageReader, decompressed
from server.transport.metadata import Header, RequestHead, Trailer, metadata_headers
from server.transport.methods import OVERLOADED, REFUSAL, STOPPING, Abort, Method
from server.transport.routing import RESPONSE_HEAD

log = logging.getLogger(__name__)

# Of incomplete messages; both far below the windows of streams and connections.
MAX_UNACKNOWLEDGED_BYTES = STREAM_WINDOW // 4
MAX_ALL_UNACKNOWLEDGED_BYTES = CONNECTION_WINDOW // 4


class GrpcCall(Stream):
    """A call: reads the request's messages, runs the method, writes its responses.

    What a unary and a streaming method do differently is in the subclasses.
    """

    __slots__ = (
        "_abort",
        "_calls",
        "_has_started",
        "_head",
        "_is_responding",
        "_method",
        "_reader",
        "_response_head",
        "_task",
        "_timer",
        "_trailing",
        "_unacknowledged",
        "_unread_bytes",
        "arrived_s",
        "caller",
        "deadline_s",
    )

    def __init__(
        self,
        calls: CallsInProgress[GrpcCall],
        sender: ResponseSender,
        stream_id: int,
        head: RequestHead,
        method: Method,
        caller: Caller,
    ) -> None:
        super().__init__(sender, stream_id)
        self.arrived_s = time.monotonic()
        self.caller = caller
        self.deadline_s = math.inf
        self._calls = calls
        self._head = head
        self._method = method
        self._reader: MessageReader | None = None  # made if the body needs one
        self._unread_bytes = 0  # of messages, complete or not, that the method has not read
        self._unacknowledged = 0  # bytes by which the client's windows are smaller
        self._has_started = False  # the method runs or has run
        self._is_responding = False  # the response's headers are sent
        self._response_head = RESPONSE_HEAD
        self._trailing: tuple[Header, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abort: Abort | None = None  # the status that a cancelled task ends with
        calls.add(self)
        if head.timeout_s is not None:
            self.deadline_s = self.arrived_s + head.timeout_s
            # The loop's clock ticks in milliseconds. The extra one keeps it from being early.
            self._timer = calls.loop.call_later(head.timeout_s + 1e-3, self._expire)

    # --- for methods -------------------------------------------------------------------------

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None if it set none."""
        return None if self.deadline_s == math.inf else self.deadline_s - time.monotonic()

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The request's metadata, values of -bin keys as bytes."""
        return self._head.metadata()

    def add_initial_metadata(self, fields: Sequence[Trailer]) -> None:
        """Adds metadata to the headers of the response; without effect once these are sent."""
        self._response_head = (*self._response_head, *metadata_headers(fields))

    def add_trailing_metadata(self, fields: Sequence[Trailer]) -> None:
        """Adds metadata to the trailers, whatever status the call ends with."""
        self._trailing = (*self._trailing, *metadata_headers(fields))

    async def write(self, message: bytes) -> None:
        """Sends one response of a stream. Returns when the message is on its way."""
        raise TypeError("a unary method returns its response")

    # --- for the server ----------------------------------------------------------------------

    @property
    def message_started_s(self) -> float | None:
        """When the message that is still arriving started; None if there is none."""
        return None if self._reader is None else self._reader.started_s

    def refuse(self, code: StatusCode, message: str, extra: Sequence[Trailer] = ()) -> None:
        """Ends the call with a status, in whatever state it is."""
        self._refuse(code, Abort(code, message, extra))

    def _refuse(self, code: StatusCode, abort: Abort) -> None:
        if not self._has_started:
            if self.open:
                self._method.refused(code)
            self._end(abort.trailers)
            self._cancel()  # so that it does not start
        elif self._task is not None and self._task.done():  # the client does not read its response
            self.sender.cancel(self)
        elif self._abort is None:
            self._abort = abort
            self._cancel()

    def recheck(self, access: CallAccess) -> None:
        """Looks at the caller again after permissions have changed. A unary call may finish."""

    # --- for the connection ------------------------------------------------------------------

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

    def aborted(self) -> None:
        self._cancel()

    def gone(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._unread_bytes:
            self._release()
        if self._unacknowledged:
            self._acknowledge()
        if self._reader is not None:
            self._reader.clear()
        self._calls.remove(self)

    # --- for the two kinds of calls ----------------------------------------------------------

    @abstractmethod
    def _add_message(self, message: bytes, compressed: bool) -> None:
        """Takes a whole message of the request."""

    @abstractmethod
    def _messages_ended(self) -> None:
        """Handles the end of a request after a whole message, or without any."""

    def _has_waiting_messages(self) -> bool:
        """Whether the client must wait until the method has read more."""
        return False

    def _start(self, run: Coroutine[Any, Any, None]) -> None:
        self._task = self._calls.loop.create_task(run)
        self._calls.loop_lag.task_queued()

    def _started(self) -> None:
        self._has_started = True
        self._calls.loop_lag.task_started()

    def _fail(self, error: BaseException) -> None:
        """Ends the call with the status that fits the method's exception."""
        abort = _abort_of(error, self._head.path) or self._abort
        if self._abort is not None and self.sender.has_unsent(self):
            # A status comes after all data, and the client does not read the data.
            self.sender.cancel(self)
            return
        if abort is None:  # cancelled because the loop ends, or the client is gone
            abort = Abort(StatusCode.UNAVAILABLE, STOPPING)
        self._end(abort.trailers)

    def _end(self, trailers: tuple[Header, ...]) -> None:
        """Sends the trailers, which end the response."""
        if not self.open:
            return
        if self._trailing:
            trailers += self._trailing
        if self._is_responding:
            self.sender.end(self, trailers)
        else:
            self.open = False
            self.sender.refuse(self.stream_id, (*self._response_head, *trailers), self.ended)

    def _acknowledge(self) -> None:
        """Lets the client send as many bytes as have come."""
        size, self._unacknowledged = self._unacknowledged, 0
        self.sender.consume(self.stream_id, size)

    def _release(self) -> None:
        """Forgets the unread bytes."""
        self._calls.receiving_bytes -= self._unread_bytes
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
        calls.receiving_bytes += size
        if calls.receiving_bytes > calls.limits.receiving_bytes and size > 0:
            raise Abort(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{calls.receiving_bytes:,} bytes of requests are being received; at most "
                f"{calls.limits.receiving_bytes:,} are allowed",
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

    def _cancel(self) -> None:
        if self._task is not None:
            if not self._has_started:
                self._calls.loop_lag.task_cancelled()
            self._task.cancel()

    def _expire(self) -> None:
        self.refuse(StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")


def _abort_of(error: BaseException, method: str) -> Abort | None:
    """The status for a method's exception; None if it was cancelled."""
    if isinstance(error, Abort):
        return error
    if isinstance(error, asyncio.CancelledError):
        return None
    log.error("call_failed", exc_info=error, extra={"method": method})
    return Abort(StatusCode.INTERNAL, "internal error")
