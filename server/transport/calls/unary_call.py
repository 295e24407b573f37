"""A call with one request and one response."""

from __future__ import annotations

import asyncio

from grpc import StatusCode

from server.security.principal import ANONYMOUS
from server.transport.calls.grpc_call import GrpcCall
from server.transport.calls.messages import framed, whole_message
from server.transport.metadata import trailers
from server.transport.methods import UnaryMethod

OK_TRAILERS = trailers(StatusCode.OK.value[0])

FIRST_BYTE_TIMEOUT_S = 20.0  # from the headers


class UnaryCall(GrpcCall):
    """Starts its method when the whole request has come."""

    __slots__ = ()

    def received(self, data: bytes, is_last: bool) -> None:
        calls = self._calls
        size = len(data)
        if (
            is_last
            and self._reader is None
            and self._principal.name == ANONYMOUS
            and calls.receiving_bytes + size <= calls.limits.receiving_bytes
        ):
            message = whole_message(data, calls.limits.message_bytes)
            if message is not None:  # the usual request
                self._unread_bytes = size
                calls.receiving_bytes += size
                self.ended = True
                self.sender.consume(self.stream_id, size)
                self._start(self._run(message))
                return
        super().received(data, is_last)

    def overdue(self, now_s: float) -> str:
        seconds = now_s - self.arrived_s
        if self.ended:
            return ""
        if self._reader is None and seconds > FIRST_BYTE_TIMEOUT_S:
            return f"request: its message did not begin within {FIRST_BYTE_TIMEOUT_S:g} s"
        return self._lateness(seconds)

    def _add_message(self, message: bytes, compressed: bool) -> None:
        if self._message is None:
            self._message = message, compressed
        else:
            self.refuse(
                StatusCode.UNIMPLEMENTED, "request: has several messages; the method takes one"
            )

    def _messages_ended(self) -> None:
        if self._message is None:
            self.refuse(StatusCode.UNIMPLEMENTED, "request: has no message; the method takes one")
        else:
            (message, compressed), self._message = self._message, None
            self._start(self._run(message, compressed))

    async def _run(self, message: bytes, is_compressed: bool = False) -> None:
        principal = self.caller.principal
        if principal.name != ANONYMOUS:
            await self._calls.starts.turn(principal, len(message))
        self._has_started = True
        calls, method = self._calls, self._method
        calls.loop_lag.task_started()
        limit_bytes = calls.limits.message_bytes
        assert isinstance(method, UnaryMethod)
        try:
            if is_compressed:
                message = await self._inflated(message)
            self._release()
            response = framed(await method.answer(message, self), limit_bytes)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            if self.open:
                trailers = OK_TRAILERS
                if self._trailing:
                    trailers += self._trailing
                self.sender.answer(self, self._response_head, response, trailers)
