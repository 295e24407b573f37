"""A call with a stream of requests and a stream of responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from server.security.caller import Caller
from server.transport.access import CallAccess, Denial
from server.transport.calls.calls_in_progress import CallsInProgress
from server.transport.calls.grpc_call import GrpcCall
from server.transport.calls.messages import PREFIX_BYTES, MessageQueue, framed
from server.transport.calls.unary_call import OK_TRAILERS
from server.transport.http2.stream import ResponseSender
from server.transport.metadata import RequestHead
from server.transport.methods import StreamingMethod

MESSAGE_COST_BYTES = 128  # memory that a waiting message takes beside its bytes


class StreamingCall(GrpcCall):
    """Starts its method at once, and lets it read requests and write responses."""

    __slots__ = ("_messages", "_written")

    def __init__(
        self,
        calls: CallsInProgress[GrpcCall],
        sender: ResponseSender,
        stream_id: int,
        head: RequestHead,
        method: StreamingMethod,
        caller: Caller,
    ) -> None:
        super().__init__(calls, sender, stream_id, head, method, caller)
        self._messages = MessageQueue(calls.loop)
        self._written: asyncio.Future[None] | None = None  # `write` waits for it
        self._start(self._run(method))

    async def write(self, message: bytes) -> None:
        """Sends one response. Returns when the message is on its way."""
        if not self.open:
            return
        if not self._is_responding:
            self._is_responding = True
            self.sender.begin(self, self._response_head)
        if not self.sender.send(self, framed(message, self._calls.limits.message_bytes)):
            self._written = self._calls.loop.create_future()
            await self._written

    def recheck(self, access: CallAccess) -> None:
        caller = access.recheck(self._head, self.sender.peer)
        if isinstance(caller, Denial):
            self.refuse(caller.code, caller.message)
        else:
            self.caller = caller

    def sent(self) -> None:
        if self._written is not None and not self._written.done():
            self._written.set_result(None)

    def gone(self) -> None:
        self._messages.clear()
        super().gone()

    def _add_message(self, message: bytes, compressed: bool) -> None:
        self._hold(MESSAGE_COST_BYTES)
        self._messages.put(message, compressed)

    def _messages_ended(self) -> None:
        self._messages.wake()

    def _has_waiting_messages(self) -> bool:
        return bool(self._messages)

    async def _run(self, method: StreamingMethod) -> None:
        self._started()
        requests = self._requests()
        try:
            await method.answer(requests, self)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            self._end(OK_TRAILERS)
        finally:
            with suppress(RuntimeError):  # a cancelled task of the method's still reads it
                await requests.aclose()

    async def _requests(self) -> AsyncGenerator[bytes, None]:
        """The messages of the request, until the client has sent its last."""
        messages = self._messages
        while True:
            while messages:
                message, compressed = messages.pop()
                self._hold(-len(message) - PREFIX_BYTES - MESSAGE_COST_BYTES)
                if compressed:
                    message = await self._inflated(message)
                    self._hold(-len(message))
                if not messages and self._unacknowledged:
                    self._acknowledge()
                yield message
            if self.ended:
                return
            await messages.wait()
