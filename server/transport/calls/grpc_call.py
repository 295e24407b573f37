"""A gRPC call on an HTTP/2 stream (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md).

Requests may be compressed (gzip, deflate). Responses are not compressed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from grpc import StatusCode

from server.security.caller import Caller
from server.transport.access import CallAccess
from server.transport.calls.calls_in_progress import CallsInProgress
from server.transport.calls.request_stream import RequestStream
from server.transport.http2.stream import ResponseSender
from server.transport.metadata import Header, RequestHead, Trailer, metadata_headers
from server.transport.methods import STOPPING, Abort, Method
from server.transport.routing import RESPONSE_HEAD

log = logging.getLogger(__name__)


class GrpcCall(RequestStream):
    """A call: runs the method, writes its responses.

    What a unary and a streaming method do differently is in the subclasses.
    """

    __slots__ = (
        "_abort",
        "_has_started",
        "_is_responding",
        "_message",
        "_method",
        "_response_head",
        "_task",
        "_timer",
        "_trailing",
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
        # Fields of the base classes too: a constructor for each would add 0.4 us to every call.
        self.sender = sender
        self.stream_id = stream_id
        self.ended = False
        self.open = True
        self._calls = calls
        self._head = head
        self._principal = caller.principal
        self._reader = None
        self._unread_bytes = 0
        self._unacknowledged = 0
        self.arrived_s = time.monotonic()
        self.caller = caller
        self.deadline_s = math.inf
        self._method = method
        self._message: tuple[bytes, bool] | None = None  # of a unary method, compressed or not
        self._has_started = False  # the method runs or has run
        self._is_responding = False  # the response's headers are sent
        self._response_head = RESPONSE_HEAD
        self._trailing: tuple[Header, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._abort: Abort | None = None  # the status that a cancelled task ends with
        calls.add(self, caller.principal)
        if head.timeout_s is not None:
            self.deadline_s = self.arrived_s + head.timeout_s
            # The loop's clock ticks in milliseconds. The extra one keeps it from being early.
            self._timer = calls.loop.call_later(head.timeout_s + 1e-3, self._expire)

    # --- for methods -------------------------------------------------------------------------

    def time_remaining(self) -> float | None:
        """Seconds to the client's deadline; None if it set none."""
        return None if self.deadline_s == math.inf else self.deadline_s - time.monotonic()

    async def turn(self, size: int) -> None:
        """Waits until another request of the same stream, with `size` bytes, may start."""
        await self._calls.starts.turn(self.caller.principal, size)

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

    def aborted(self) -> None:
        self._cancel()

    def gone(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._unread_bytes or self._unacknowledged or self._reader is not None:
            self._forget_request()
        self._calls.remove(self)

    # --- for the two kinds of calls ----------------------------------------------------------

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
