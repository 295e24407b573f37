"""A call with one request and one response."""

from __future__ import annotations

import asyncio

from grpc import StatusCode

from server.security.caller import Caller
from server.transport.calls.calls_in_progress import CallsInProgress
from server.transport.calls.grpc_call import GrpcCall
from server.transport.calls.messages import framed, whole_message
from server.transport.http2.stream import ResponseSender
from server.transport.metadata import RequestHead, trailers
from server.transport.methods import UnaryMethod

OK_TRAILERS = trailers(StatusCode.OK.value[0])

FIRST_BYTE_TIMEOUT_S = 20.0  # from the headers


class UnaryCall(GrpcCall):
    """Starts its method when the whole request has come."""

    __slots__ = ("_answer", "_is_compressed", "_message")

    def __init__(
        self,
        calls: CallsInProgress[GrpcCall],
        sender: ResponseSender,
        stream_id: int,
        head: RequestHead,
        method: UnaryMethod,
        caller: Caller,
    ) -> None:
        super().__init__(calls, sender, stream_id, head, method, caller)
        self._answer = method.answer
        self._message: bytes | None = None  # the request
        self._is_compressed = False

    def received(self, data: bytes, is_last: bool) -> None:
        calls = self._calls
        size = len(data)
        if (
            is_last
            and self._reader is None
            and calls.receiving_bytes + size <= calls.limits.receiving_bytes
        ):
            message = whole_message(data, calls.limits.message_bytes)
            if message is not None:  # the usual request
                self._unread_bytes = size
                calls.receiving_bytes += size
                self.ended = True
                self._message = message
                self.sender.consume(self.stream_id, size)
                self._start(self._run())
                return
        super().received(data, is_last)

    def overdue(self, now_s: float) -> str:
        seconds = now_s - self.arrived_s
        if self.ended:
            return ""
        if self._reader is None and seconds > FIRST_BYTE_TIMEOUT_S:
            return f"request: its message did not begin within {FIRST_BYTE_TIMEOUT_S:g} s"
        return self._lateness(seconds)

    def gone(self) -> None:
        self._message = None
        super().gone()

    def _add_message(self, message: bytes, compressed: bool) -> None:
        if self._message is None:
            self._message, self._is_compressed = message, compressed
        else:
            self.refuse(
                StatusCode.UNIMPLEMENTED, "request: has several messages; the method takes one"
            )

    def _messages_ended(self) -> None:
        if self._message is None:
            self.refuse(StatusCode.UNIMPLEMENTED, "request: has no message; the method takes one")
        else:
            self._start(self._run())

    async def _run(self) -> None:
        self._started()
        limit_bytes = self._calls.limits.message_bytes
        try:
            message, self._message = self._message, None
            assert message is not None
            if self._is_compressed:
                message = await self._inflated(message)
            self._release()
            response = framed(await self._answer(message, self), limit_bytes)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            if self.open:
                trailers = OK_TRAILERS
                if self._trailing:
                    trailers += self._trailing
                self.sender.answer(self, self._response_head, response, trailers)
