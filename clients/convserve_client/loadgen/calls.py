"""gRPC's unary calls over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md), for load.

A call must cost a sender as little as can be: it is one object, told by a method when it is over;
there is no task, no future and no timer of its own. Nothing is repeated: what the server never saw
ends UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from heapq import heapify, heappop, heappush

import grpc

from convserve_client.async_client import MAX_MESSAGE_BYTES
from convserve_client.error_translation import translate
from convserve_client.errors import ServerUnreachable
from convserve_client.loadgen.headers import Head, request_block
from convserve_client.loadgen.http2 import (
    CANCEL,
    ENHANCE_YOUR_CALM,
    INADEQUATE_SECURITY,
    REFUSED_STREAM,
    STREAM_CLOSED,
    Connection,
    Stream,
)

MESSAGE_HEAD = 5  # a byte that says whether the message is compressed, and four of its length
MESSAGE_LIMIT = MESSAGE_HEAD + MAX_MESSAGE_BYTES

CODES = {code.value[0]: code for code in grpc.StatusCode}
OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, PERMISSION_DENIED = 0, 1, 2, 4, 7
RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, UNAUTHENTICATED = 8, 12, 13, 14, 16
# What a response means that says nothing of gRPC, and a stream that was reset.
OF_HTTP = {
    **{"400": INTERNAL, "401": UNAUTHENTICATED, "403": PERMISSION_DENIED, "404": UNIMPLEMENTED},
    **dict.fromkeys(("429", "502", "503", "504"), UNAVAILABLE),
}
OF_RESET = {
    REFUSED_STREAM: UNAVAILABLE,
    CANCEL: CANCELLED,
    STREAM_CLOSED: UNKNOWN,
    ENHANCE_YOUR_CALM: RESOURCE_EXHAUSTED,
    INADEQUATE_SECURITY: PERMISSION_DENIED,
}

CONNECT_S = 10.0
RECONNECT_S = 0.1  # from a failure to connect to the next try; calls meanwhile fail at once
CLOSE_S = 1.0  # for what was written last to go out
TICK_S = 0.001  # of the loop's timers, which may be so much too early
KEPT_BLOCKS = 64  # of requests, by their timeouts
KEPT_DEADLINES = 1000  # of calls that are over, beside as many as are not

clock = time.monotonic  # the same for all processes of a machine


def framed(message: bytes) -> bytes:
    """A message as it is sent."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Call(Stream):
    """A call, to be sent by a channel; once it is over it may be sent again."""

    __slots__ = (
        "_body",
        "_head",
        "answer",
        "code",
        "connection",
        "deadline_s",
        "message",
        "over",
        "trailers",
    )

    def __init__(self) -> None:
        super().__init__()
        self.over = True
        self.connection: Connection | None = None  # the one it is on
        self.deadline_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self.code = OK  # gRPC's status, as a number
        self.message = ""  # what came with it
        self.answer = b""
        self.trailers: Head | None = None
        self._head: Head | None = None
        self._body: bytes | bytearray = b""

    @abstractmethod
    def ended(self) -> None:
        """It is over: `code` and `message`, `answer` or `trailers` tell how. Never called from
        within `Channel.start`."""

    def failure(self) -> grpc.aio.AioRpcError:
        """Of a call that did not end well: what grpcio would have raised."""
        trailing = self.trailers.metadata() if self.trailers else []
        return grpc.aio.AioRpcError(
            CODES[self.code],
            grpc.aio.Metadata(),
            grpc.aio.Metadata(*trailing),
            self.message,
            None,
        )

    def hint(self) -> float:
        """Seconds that a refusal asks to wait; -1 where it asks for none, or for no further try."""
        for key, value in self.trailers.fields if self.trailers else ():
            if key == b"grpc-retry-pushback-ms":  # cheaper to read than a google.rpc.RetryInfo
                return int(value) / 1000 if value.isdigit() else -1.0
        hint_s = translate(self.failure(), connected=True).retry_after_s
        return -1.0 if hint_s is None or hint_s == float("inf") else hint_s

    def end(self, code: int, message: str) -> None:
        self.over, self.connection = True, None
        self.code, self.message = code, message
        self.ended()

    # --- of the stream -----------------------------------------------------------------------

    def headers(self, head: Head) -> None:
        if self._head is not None:
            self._give_up(INTERNAL, "the answer's headers came twice")
        elif not head.status.startswith("1"):
            self._head = head

    def received(self, data: bytes, start: int, end: int) -> None:
        if not self._body:
            self._body = data[start:end]
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += data[start:end]
        if len(self._body) > MESSAGE_LIMIT:
            self._give_up(
                RESOURCE_EXHAUSTED, f"the answer is longer than {MAX_MESSAGE_BYTES:,} bytes"
            )

    def response_ended(self, trailers: Head) -> None:
        self.over, self.connection = True, None
        head = self._head or trailers
        if trailers.grpc_status == "0" and head.is_grpc:
            self._read_answer()
        else:
            self.trailers = trailers
            self.code, self.message = _told(head, trailers)
        self.ended()

    def failed(self, code: int | None, why: str) -> None:
        self.end(UNAVAILABLE if code is None else OF_RESET.get(code, INTERNAL), why)

    def _give_up(self, code: int, why: str) -> None:
        assert self.connection is not None
        self.connection.reset(self)
        self.end(code, why)

    def _read_answer(self) -> None:
        body = self._body
        if len(body) < MESSAGE_HEAD or int.from_bytes(body[1:5], "big") != len(body) - MESSAGE_HEAD:
            self.code, self.message = INTERNAL, "the answer is not one whole message"
        elif body[0]:
            self.code, self.message = INTERNAL, "the answer is compressed, which nobody asked for"
        else:
            self.answer = bytes(body[MESSAGE_HEAD:])


class Channel:
    """Calls of one method, on one connection at a time. Belongs to one event loop.

    Calls beyond the streams that the server allows wait for others to end, and while there is no
    connection for one.
    """

    def __init__(self, target: str, method: str) -> None:
        """`target` is HOST:PORT."""
        host, _, port = target.rpartition(":")
        self._host, self._port = host.removeprefix("[").removesuffix("]"), int(port)
        self._target = target
        self._method = method
        self._loop = asyncio.get_running_loop()
        self._blocks: dict[float, bytes] = {}
        self._connection: Connection | None = None  # that takes calls
        self._connections: set[Connection] = set()
        self._dialling: asyncio.Task[None] | None = None
        self._dial_from_s = 0.0
        self._waiting: dict[Call, tuple[bytes, bytes]] = {}  # block and body
        self._deadlines: list[tuple[float, int, Call]] = []
        self._number = 0
        self._most_deadlines = KEPT_DEADLINES
        self._alarm: asyncio.TimerHandle | None = None
        self._rings_s = 0.0

    async def connect(self) -> None:
        """Raises ServerUnreachable."""
        why = "it does not greet as HTTP/2 does"
        try:
            async with asyncio.timeout(CONNECT_S):
                while True:
                    try:
                        await self._connect()
                        return
                    except OSError as error:
                        why = str(error)
                    await asyncio.sleep(RECONNECT_S)
        except TimeoutError:
            raise ServerUnreachable(
                f"{self._target} took no connection within {CONNECT_S:g} s: {why}"
            ) from None

    def start(self, call: Call, body: bytes, timeout_s: float) -> None:
        """Sends a call that is not on its way; `body` is the request, `framed`."""
        call._begin()
        call.over = False
        call.deadline_s = deadline_s = clock() + timeout_s
        self._number = number = self._number + 1
        heappush(self._deadlines, (deadline_s, number, call))
        if self._alarm is None or deadline_s < self._rings_s:
            self._set_alarm(deadline_s)
        if number > self._most_deadlines:
            self._forget_the_ended()
        block = self._blocks.get(timeout_s) or self._block(timeout_s)
        connection = self._connection
        if (
            connection is None
            or len(connection.streams) >= connection.most_streams
            or self._waiting
        ):
            self._waiting[call] = block, body
            if connection is None and self._dialling is None:
                self._dial()
        else:
            call.connection = connection
            connection.open(call, block, body)

    def cancel(self, call: Call) -> None:
        """Ends a call that is on its way, which is not told of it."""
        call.over = True
        if call.connection is None:
            del self._waiting[call]
        else:
            connection, call.connection = call.connection, None
            connection.reset(call)

    async def close(self) -> None:
        """What is on its way still ends UNAVAILABLE."""
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.gather(self._dialling, return_exceptions=True)
            self._dialling = None
        if self._alarm is not None:
            self._alarm.cancel()
        self._dial_from_s = float("inf")
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        if connections:
            _, slow = await asyncio.wait([one.gone for one in connections], timeout=CLOSE_S)
            for connection in connections:
                if connection.gone in slow:
                    connection.abort()
                    await connection.gone
        self._fail_waiting("the channel was closed")

    # --- of the connection -------------------------------------------------------------------

    def has_room(self, connection: Connection) -> None:
        if self._waiting:
            while (
                self._waiting
                and connection is self._connection
                and len(connection.streams) < connection.most_streams
            ):
                call = next(iter(self._waiting))
                block, body = self._waiting.pop(call)
                call.connection = connection
                connection.open(call, block, body)
            if self._waiting and self._connection is None and self._dialling is None:
                self._dial()

    def leaving(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            if self._waiting and self._dialling is None:
                self._dial()

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)

    # --- connecting --------------------------------------------------------------------------

    def _dial(self) -> None:
        if clock() < self._dial_from_s:
            self._loop.call_soon(self._fail_waiting, f"{self._target} is not there")
        else:
            self._dialling = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._connect()
        except OSError as error:  # TimeoutError is one
            self._dial_from_s = clock() + RECONNECT_S
            self._dialling = None
            self._fail_waiting(f"{self._target} can't be reached: {error}")
        else:
            self._dialling = None
            if self._connection is not None:
                self.has_room(self._connection)

    async def _connect(self) -> None:
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), self._host, self._port
        )
        self._connections.add(connection)
        try:
            await connection.ready
        except BaseException:
            connection.abort()
            raise
        if not connection.left:
            self._connection = connection

    def _fail_waiting(self, why: str) -> None:
        if self._connection is None and self._dialling is None:
            waiting = list(self._waiting)
            self._waiting.clear()
            for call in waiting:
                call.end(UNAVAILABLE, why)

    # --- deadlines ---------------------------------------------------------------------------

    def _set_alarm(self, deadline_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._rings_s = deadline_s
        self._alarm = self._loop.call_later(max(0.0, deadline_s - clock()) + TICK_S, self._expire)

    def _expire(self) -> None:
        """Ends the calls whose deadline has passed, and waits for the next one's."""
        self._alarm = None
        deadlines, now_s = self._deadlines, clock()
        while deadlines and (deadlines[0][0] <= now_s or _stale(deadlines[0])):
            deadline = heappop(deadlines)
            if not _stale(deadline):
                call = deadline[2]
                self.cancel(call)
                call.end(DEADLINE_EXCEEDED, "the deadline has passed")
        if deadlines and (self._alarm is None or deadlines[0][0] < self._rings_s):
            self._set_alarm(deadlines[0][0])

    def _forget_the_ended(self) -> None:
        self._deadlines[:] = [one for one in self._deadlines if not _stale(one)]
        heapify(self._deadlines)
        self._most_deadlines = self._number + len(self._deadlines) + KEPT_DEADLINES

    # --- requests ----------------------------------------------------------------------------

    def _block(self, timeout_s: float) -> bytes:
        if len(self._blocks) >= KEPT_BLOCKS:  # tries after a hint have as much time as is left
            self._blocks.clear()
        block = self._blocks[timeout_s] = request_block(self._method, self._target, timeout_s)
        return block


class _Asked(Call):
    """A call that is awaited."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        super().__init__()
        self._waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        await self._waiter


async def ask(channel: Channel, message: bytes, timeout_s: float) -> Call:
    """The call, when it is over."""
    call = _Asked()
    channel.start(call, framed(message), timeout_s)
    try:
        await call.wait()
    except asyncio.CancelledError:
        if not call.over:
            channel.cancel(call)
        raise
    return call


def _stale(deadline: tuple[float, int, Call]) -> bool:
    """Whether it is of a call that is over, or was sent again since."""
    deadline_s, _, call = deadline
    return call.over or call.deadline_s != deadline_s


def _told(head: Head, trailers: Head) -> tuple[int, str]:
    """Status and message of a response that is not a success."""
    status = trailers.grpc_status
    if status is not None:
        code = int(status) if status.isascii() and status.isdigit() else -1
        if code == OK:
            return UNKNOWN, f"the answer is of the type {head.content_type!r}"
        if code not in CODES:
            return UNKNOWN, f"the status is {status!r}: {trailers.message}"
        return code, trailers.message
    if head.status != "200":
        return OF_HTTP.get(head.status, UNKNOWN), f"the answer has HTTP's status {head.status}"
    if not head.is_grpc:
        return UNKNOWN, f"the answer is of the type {head.content_type!r}"
    return UNKNOWN, "the answer ended without a status"
