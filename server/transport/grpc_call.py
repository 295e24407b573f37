"""A gRPC call on an HTTP/2 stream (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md).

Requests may be compressed (gzip, deflate). Responses are not compressed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

from grpc import StatusCode

from server.transport.calls_in_progress import CallsInProgress
from server.transport.connection import (
    CONNECTION_WINDOW,
    STREAM_WINDOW,
    ServerConnection,
    Stream,
)
from server.transport.messages import (
    PREFIX_BYTES,
    MessageError,
    MessageQueue,
    MessageReader,
    decompressed,
    framed,
    whole_message,
)
from server.transport.metadata import (
    ENCODINGS,
    MAX_HEADERS_BYTES,
    Header,
    RequestHead,
    Trailer,
    response_head,
    trailers,
)
from server.transport.methods import Abort, Method, StreamingMethod, UnaryMethod

log = logging.getLogger(__name__)

MESSAGE_COST_BYTES = 128  # memory that a waiting message takes beside its bytes

# Of incomplete messages; both far below the windows of streams and connections.
MAX_UNACKNOWLEDGED_BYTES = STREAM_WINDOW // 4
MAX_ALL_UNACKNOWLEDGED_BYTES = CONNECTION_WINDOW // 4

RESPONSE_HEAD = response_head("application/grpc")
OK_TRAILERS = trailers(StatusCode.OK.value[0])

STOPPING = "the server is stopping"

BUSY_RETRY_S = 0.1  # pushback of a call refused for memory: most calls take less


class GrpcCall(Stream):
    """A call: reads the request's messages, runs the method, writes its responses."""

    __slots__ = (
        "_abort",
        "_calls",
        "_has_started",
        "_head",
        "_is_compressed",
        "_is_responding",
        "_message",
        "_messages",
        "_method",
        "_reader",
        "_task",
        "_timer",
        "_unacknowledged",
        "_unread_bytes",
        "_written",
        "arrived_s",
        "deadline_s",
    )

    def __init__(
        self,
        calls: CallsInProgress[GrpcCall],
        connection: ServerConnection,
        stream_id: int,
        head: RequestHead,
        method: Method | None,
    ) -> None:
        super().__init__(connection, stream_id)
        self.arrived_s = time.monotonic()
        self.deadline_s = math.inf
        self._calls = calls
        self._head = head
        self._method = method
        self._reader: MessageReader | None = None  # made if the body needs one
        self._unread_bytes = 0  # of messages, complete or not, that the method has not read
        self._message: bytes | None = None  # the request of a unary method
        self._is_compressed = False
        self._messages: MessageQueue | None = None  # the requests of a streaming method
        self._unacknowledged = 0  # bytes by which the client's windows are smaller
        self._written: asyncio.Future[None] | None = None  # `write` waits for it
        self._has_started = False  # the method runs or has run
        self._is_responding = False  # the response's headers are sent
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abort: Abort | None = None  # the status that a cancelled task ends with
        calls.add(self)
        self._open()

    # --- for methods -------------------------------------------------------------------------

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None if it set none."""
        return None if self.deadline_s == math.inf else self.deadline_s - time.monotonic()

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """The request's metadata, values of -bin keys as bytes."""
        return self._head.metadata()

    async def write(self, message: bytes) -> None:
        """Sends one response of a stream. Returns when the message is on its way."""
        if not self.open:
            return
        if not self._is_responding:
            self._is_responding = True
            self.connection.begin(self, RESPONSE_HEAD)
        if not self.connection.send(self, framed(message, self._calls.limits.message_bytes)):
            self._written = self._calls.loop.create_future()
            await self._written

    @property
    def message_started_s(self) -> float | None:
        """When the message that is still arriving started; None if there is none."""
        return None if self._reader is None else self._reader.started_s

    def refuse(self, code: StatusCode, message: str, extra: Sequence[Trailer] = ()) -> None:
        """Ends the call with a status, in whatever state it is."""
        abort = Abort(code, message, extra)
        if not self._has_started:
            if self._method is not None and self.open:
                self._method.refused(code)
            self._end(abort.trailers)
            self._cancel()  # so that it does not start
        elif self._task is not None and self._task.done():  # the client does not read its response
            self.connection.cancel(self)
        elif self._abort is None:
            self._abort = abort
            self._cancel()

    # --- for the connection ------------------------------------------------------------------

    def received(self, data: bytes, is_last: bool) -> None:
        calls = self._calls
        size = len(data)
        self._unread_bytes += size
        calls.receiving_bytes += size
        if calls.receiving_bytes > calls.limits.receiving_bytes:
            self.refuse(*_too_many_bytes(calls))
        elif self._reader is not None:
            if not is_last and self._reader.keep_middle(data):
                self._unacknowledged += size
                if not self._messages and self._must_acknowledge():
                    self._acknowledge()
                return
        elif is_last and self._messages is None:
            message = whole_message(data, calls.limits.message_bytes)
            if message is not None:  # the usual unary request
                self.ended = True
                self._message = message
                self.connection.consume(self.stream_id, size)
                self._start()
                return
        if data:
            self._read(data)
        if is_last:
            self.ended = True
            if self.open:
                self.request_ended()

    def request_ended(self) -> None:
        if self._reader is not None and self._reader.is_inside_message:
            self.refuse(StatusCode.INVALID_ARGUMENT, "request: ends in the middle of a message")
        elif self._messages is not None:
            self._messages.wake()
        elif self._message is None:
            self.refuse(StatusCode.UNIMPLEMENTED, "request: has no message; the method takes one")
        else:
            self._start()

    def aborted(self) -> None:
        self._cancel()

    def gone(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._unread_bytes:
            self._release()
        if self._unacknowledged:
            self._acknowledge()
        self._message = None
        if self._messages is not None:
            self._messages.clear()
        if self._reader is not None:
            self._reader.clear()
        self._calls.remove(self)

    def sent(self) -> None:
        if self._written is not None and not self._written.done():
            self._written.set_result(None)

    # --- from the first header to the status -------------------------------------------------

    def _open(self) -> None:
        """Checks the headers. A streaming method starts at once, a unary one with its message."""
        head, method = self._head, self._method
        if not head.is_call:
            status = 415 if head.method == "POST" else 405
            self.connection.begin(self, response_head("text/plain", status), end=True)
        elif self._calls.is_refusing:
            self.refuse(StatusCode.UNAVAILABLE, STOPPING)
        elif method is None or not head.is_valid:
            self.refuse(*_problem_of(head, method))
        else:
            if head.timeout_s is not None:
                self.deadline_s = self.arrived_s + head.timeout_s
                # The loop's clock ticks in milliseconds. The extra one keeps it from being early.
                delay_s = head.timeout_s + 1e-3
                self._timer = self._calls.loop.call_later(delay_s, self._expire)
            if isinstance(method, StreamingMethod):
                self._messages = MessageQueue(self._calls.loop)
                self._start()

    def _start(self) -> None:
        method = self._method
        if isinstance(method, UnaryMethod):
            run = self._run_unary(method)
        else:
            assert method is not None
            assert self._messages is not None
            run = self._run_stream(method, self._messages)
        self._task = self._calls.loop.create_task(run)
        self._calls.loop_lag.task_queued()

    def _cancel(self) -> None:
        if self._task is not None:
            if not self._has_started:
                self._calls.loop_lag.task_cancelled()
            self._task.cancel()

    def _expire(self) -> None:
        self.refuse(StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")

    async def _run_unary(self, method: UnaryMethod) -> None:
        self._has_started = True
        self._calls.loop_lag.task_started()
        limit_bytes = self._calls.limits.message_bytes
        try:
            message, self._message = self._message, None
            assert message is not None
            if self._is_compressed:
                message = await decompressed(message, self._head.encoding, limit_bytes)
            self._release()
            response = framed(await method.answer(message, self), limit_bytes)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            if self.open:
                self.connection.answer(self, RESPONSE_HEAD, response, OK_TRAILERS)

    async def _run_stream(self, method: StreamingMethod, messages: MessageQueue) -> None:
        self._has_started = True
        self._calls.loop_lag.task_started()
        requests = self._requests(messages)
        try:
            await method.answer(requests, self)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            self._end(OK_TRAILERS)
        finally:
            with suppress(RuntimeError):  # a cancelled task of the method's still reads it
                await requests.aclose()

    async def _requests(self, messages: MessageQueue) -> AsyncGenerator[bytes, None]:
        """The messages of a stream, until the client has sent its last."""
        limit_bytes = self._calls.limits.message_bytes
        while True:
            while messages:
                message, compressed = messages.pop()
                self._hold(-len(message) - PREFIX_BYTES - MESSAGE_COST_BYTES)
                if compressed:
                    message = await decompressed(message, self._head.encoding, limit_bytes)
                if not messages and self._unacknowledged:
                    self._acknowledge()
                yield message
            if self.ended:
                return
            await messages.wait()

    def _fail(self, error: BaseException) -> None:
        """Ends the call with the status that fits the method's exception."""
        abort = _abort_of(error, self._head) or self._abort
        if self._abort is not None and self.connection.has_unsent(self):
            # A status comes after all data, and the client does not read the data.
            self.connection.cancel(self)
            return
        if abort is None:  # cancelled because the loop ends, or the client is gone
            abort = Abort(StatusCode.UNAVAILABLE, STOPPING)
        self._end(abort.trailers)

    def _end(self, trailers: Sequence[Header]) -> None:
        """Sends the trailers, which end the response."""
        if not self.open:
            return
        if self._is_responding:
            self.connection.end(self, trailers)
        else:
            self.connection.begin(self, (*RESPONSE_HEAD, *trailers), end=True)

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
        if not self.open or (
            not self._messages and (not reader.is_inside_message or self._must_acknowledge())
        ):
            self._acknowledge()

    def _add_message(self, message: bytes, compressed: bool) -> None:
        if self._messages is not None:
            self._hold(MESSAGE_COST_BYTES)
            self._messages.put(message, compressed)
        elif self._message is None:
            self._message, self._is_compressed = message, compressed
        else:
            self.refuse(
                StatusCode.UNIMPLEMENTED, "request: has several messages; the method takes one"
            )

    def _must_acknowledge(self) -> bool:
        """Whether to acknowledge parts of a message; for each frame it would cost too much."""
        return (
            self._unacknowledged >= MAX_UNACKNOWLEDGED_BYTES
            or self._calls.receiving_bytes > MAX_ALL_UNACKNOWLEDGED_BYTES
        )

    def _acknowledge(self) -> None:
        """Lets the client send as many bytes as have come."""
        size, self._unacknowledged = self._unacknowledged, 0
        self.connection.consume(self.stream_id, size)

    def _release(self) -> None:
        """Forgets the unread bytes."""
        self._calls.receiving_bytes -= self._unread_bytes
        self._unread_bytes = 0

    def _hold(self, size: int) -> None:
        """Counts `size` more unread bytes. Refuses the call if all calls hold too many."""
        calls = self._calls
        self._unread_bytes += size
        calls.receiving_bytes += size
        if calls.receiving_bytes > calls.limits.receiving_bytes and size > 0:
            self.refuse(*_too_many_bytes(calls))


def _too_many_bytes(
    calls: CallsInProgress[GrpcCall],
) -> tuple[StatusCode, str, Sequence[Trailer]]:
    message = (
        f"{calls.receiving_bytes:,} bytes of requests are being received; at most "
        f"{calls.limits.receiving_bytes:,} are allowed"
    )
    pushback = ("grpc-retry-pushback-ms", f"{BUSY_RETRY_S * 1e3:.0f}")
    return StatusCode.RESOURCE_EXHAUSTED, message, [pushback]


def _abort_of(error: BaseException, head: RequestHead) -> Abort | None:
    """The status for a method's exception; None for a cancelled method."""
    if isinstance(error, Abort):
        return error
    if isinstance(error, asyncio.CancelledError):
        return None
    log.error("call_failed", exc_info=error, extra={"method": head.path})
    return Abort(StatusCode.INTERNAL, "internal error")


def _problem_of(
    head: RequestHead, method: Method | None
) -> tuple[StatusCode, str] | tuple[StatusCode, str, Sequence[Trailer]]:
    """The status of a call whose method does not exist, or whose headers are not valid."""
    if head.size > MAX_HEADERS_BYTES:
        return (
            StatusCode.RESOURCE_EXHAUSTED,
            f"metadata: is {head.size:,} bytes; at most {MAX_HEADERS_BYTES:,} are allowed",
        )
    if method is None:
        return StatusCode.UNIMPLEMENTED, f"there is no method {head.path[:200]}"
    if head.encoding and head.encoding not in ENCODINGS:
        return (
            StatusCode.UNIMPLEMENTED,
            f"grpc-encoding: is {head.encoding[:40]}; {', '.join(ENCODINGS)} are allowed",
            [("grpc-accept-encoding", ",".join(ENCODINGS))],
        )
    return (
        StatusCode.INVALID_ARGUMENT,
        f"grpc-timeout: is {head.timeout[:40]!r}; 1 to 8 digits and one of H, M, S, m, u and n "
        "are allowed",
    )
