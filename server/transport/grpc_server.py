"""gRPC over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md): calls, and a server of them.

A method is a coroutine that gets bytes and gives bytes, and raises `Abort` to end its call with
another status than OK. Requests may be compressed (gzip, deflate); responses never are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from grpc import StatusCode

from server.telemetry.loop_lag import LoopLag
from server.transport import connection as http2
from server.transport.compression import (
    WINDOW_BITS,
    Damaged,
    TooLarge,
    inflate,
)
from server.transport.connection import (
    CANCEL,
    GRANT_BYTES,
    Connection,
    Stream,
)
from server.transport.metadata import (
    HEADERS_BYTES,
    Head,
    Trailer,
    block,
    trailer_block,
)

log = logging.getLogger(__name__)

MESSAGE_HEAD = 5  # a byte that says whether the message is compressed, and four of its length
MESSAGE_COST_BYTES = 128  # of our memory for a message that waits, however small it is
SMALL_PIECE_BYTES = 4096  # of a message: smaller ones are put together, as each costs 200 bytes

OK_HEAD = block([("content-type", "application/grpc")])
OK_TRAILERS = trailer_block(StatusCode.OK.value[0])

GRPC = re.compile(r"application/grpc([+;]|$)")  # and not application/grpc-web

ENCODINGS = ("identity", *WINDOW_BITS)

STOPPING = "the server is stopping"

BUSY_RETRY_S = 0.1  # when a call may try again that was not taken in: most calls take less

TEND_S = 10.0  # between looks at the connections
GREETING_S = 20.0  # for a connection to say that it speaks HTTP/2
SILENCE_S = 60.0  # of a connection, before it is asked whether it lives
ANSWER_S = 20.0  # to answer that
# Of its time that a call may wait to begin. It has waited about as long to be read, its answer will
# wait as long again for the same crowd, and its batch takes time too. (LeNet-5, deadlines of 20 ms,
# 9,000 to 12,000 a second in a closed loop. Of 20,000 a second 0.2 answers 840 in time, 0.1, 0.07
# and 0.05 about 13,000; of 40,000 they answer 940, 8,100, 9,700 and 11,400.)
LATEST = 0.07
RECEIVE_S = 60.0  # for a message to come whole
LINGER_S = 1.0  # for the other ends to leave, and to take the last bytes


class Abort(Exception):
    """Ends a call with a status."""

    def __init__(self, code: StatusCode, message: str, trailers: Sequence[Trailer] = ()) -> None:
        super().__init__(message)
        self.block = trailer_block(code.value[0], message, trailers)

    @classmethod
    def again(cls, block: bytes) -> Abort:
        """Another one with the `block` of one before."""
        abort = cls.__new__(cls)
        abort.block = block
        return abort


@dataclass(frozen=True, slots=True)
class Unary:
    """A method that has one request and one response.

    `busy` says how a call is refused that would begin too late, from the seconds until it would.
    Without it every call begins. `refused` is told of calls that end before they have begun.
    """

    answer: Callable[[bytes, Call], Awaitable[bytes]]
    busy: Callable[[float], Abort] | None = None
    refused: Callable[[StatusCode], None] = lambda code: None


@dataclass(frozen=True, slots=True)
class Streaming:
    """A method that reads requests while there are any, and writes responses to its call."""

    answer: Callable[[AsyncIterator[bytes], Call], Awaitable[None]]
    refused: Callable[[StatusCode], None] = lambda code: None


Method = Unary | Streaming


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes in."""

    message_bytes: int  # of a message, either way
    receiving_bytes: int  # of all messages that have not come whole yet
    streams: int  # of a connection


class Server:
    """Answers the methods it is given, by path, at one socket. Used on the loop's thread only."""

    def __init__(
        self, methods: Mapping[str, Method], limits: Limits, backlog: LoopLag | None = None
    ) -> None:
        self.methods = methods
        self.limits = limits
        self.receiving_bytes = 0
        self.backlog = backlog or LoopLag()
        self.loop = asyncio.get_running_loop()
        self._connections: dict[Connection, float] = {}  # with when they were last heard of
        self._calls: set[Call] = set()
        self._listener: asyncio.Server | None = None
        self._tending: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()  # no call is in progress
        self._idle.set()
        self._gone = asyncio.Event()  # no connection is there
        self._gone.set()
        self._stopping = False
        self.ending = False  # calls are refused

    async def start(self, listener: socket.socket) -> None:
        """Takes connections, and calls, from now on."""
        self._listener = await self.loop.create_server(self._connection, sock=listener)
        self._tend()

    async def stop(self, grace_s: float | None) -> None:
        """Takes no more connections, tells those there are to go elsewhere, and waits for the calls
        in progress, for so long at most; the others end UNAVAILABLE. May be called again, to wait
        no longer."""
        self._stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections:
            connection.retire()
        if grace_s is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._idle.wait()
                    await self._left()  # what was on its way when they were told is answered too
                    await self._idle.wait()
        self.ending = True
        for call in list(self._calls):
            call.refuse(StatusCode.UNAVAILABLE, STOPPING)
        await self._idle.wait()
        for connection in list(self._connections):
            connection.close()
        await self._left()
        for connection in list(self._connections):
            connection.abort()
        await self._gone.wait()
        if self._tending is not None:
            self._tending.cancel()

    async def _left(self) -> None:
        """Until all connections have ended, within reason."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._gone.wait()

    def _hurry(self, now_s: float) -> None:
        """Ends calls whose request does not come: else a few could take all there is room for."""
        for call in list(self._calls):
            if call.begun_s is not None and now_s - call.begun_s > RECEIVE_S:
                message = f"request: did not come whole within {RECEIVE_S:g} s"
                call.refuse(StatusCode.DEADLINE_EXCEEDED, message)

    def began(self, call: Call) -> None:
        self._calls.add(call)
        self._idle.clear()

    def ended(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()

    def _connection(self) -> Connection:
        return Connection(self._call, self._opened, self._closed, self.limits.streams)

    def _opened(self, connection: Connection) -> None:
        self._connections[connection] = time.monotonic()
        self._gone.clear()
        if self._stopping:
            connection.abort()

    def _closed(self, connection: Connection) -> None:
        del self._connections[connection]
        if not self._connections:
            self._gone.set()

    def _call(self, connection: Connection, stream_id: int, head: Head) -> Stream | bytes:
        method = self.methods.get(head.path)
        if isinstance(method, Unary) and (busy := self._busy(method, head)) is not None:
            return OK_HEAD + busy.block
        return Call(self, connection, stream_id, head, method)

    def _busy(self, method: Unary, head: Head) -> Abort | None:
        """How a call is refused that would begin too late.

        With more calls than there is processor time for, all would begin when theirs is over:
        refusing one here, before there is a stream, takes a tenth of what beginning it does.
        """
        if method.busy is None or head.timeout_s is None or self.ending:
            return None
        wait_s = self.backlog.wait_s
        return method.busy(wait_s) if wait_s > LATEST * head.timeout_s else None

    def _tend(self) -> None:
        """Lets go of those who have vanished: the system alone would notice after two hours."""
        now_s = time.monotonic()
        for connection, heard_s in list(self._connections.items()):
            if connection.heard:
                connection.heard = False
                self._connections[connection] = now_s
            elif now_s - heard_s > SILENCE_S + ANSWER_S:
                connection.abort()
            elif now_s - heard_s > (SILENCE_S if connection.greeted else GREETING_S):
                if connection.greeted:
                    connection.ping()
                else:
                    connection.abort()
        self._hurry(now_s)
        self._tending = self.loop.call_later(TEND_S, self._tend)


class Call(Stream):
    """A call: what its method knows of it, and how messages come in and go out."""

    __slots__ = (
        "_awaited",
        "_compressed",
        "_head",
        "_held",
        "_messages",
        "_method",
        "_missing",
        "_pieces",
        "_prefix",
        "_responding",
        "_room",
        "_running",
        "_server",
        "_task",
        "_timer",
        "_why",
        "arrived_s",
        "begun_s",
        "deadline_s",
    )

    def __init__(
        self,
        server: Server,
        connection: Connection,
        stream_id: int,
        head: Head,
        method: Method | None,
    ) -> None:
        super().__init__(connection, stream_id)
        self.arrived_s = time.monotonic()
        self.deadline_s = math.inf
        self._server = server
        self._head = head
        self._method = method
        self.begun_s: float | None = None  # when the message began that is coming
        self._prefix = b""  # of a message: the first bytes of those five
        self._missing = 0  # bytes of a message that has begun
        self._compressed = False
        self._pieces: list[bytes | bytearray | memoryview] = []  # of that message
        self._held = 0  # bytes of messages that nobody has read
        self._messages: deque[tuple[bytes, bool]] = deque()  # with whether they are compressed
        self._awaited: asyncio.Future[None] | None = None  # by who reads messages
        self._room: asyncio.Future[None] | None = None  # awaited by who writes one
        self._running = False  # the method has begun
        self._responding = False  # the response's headers are sent
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why: Abort | None = None  # what the task is cancelled for, if the caller is to know
        server.began(self)
        self._open()

    # --- for methods -------------------------------------------------------------------------

    def time_remaining(self) -> float | None:
        """Seconds to the caller's deadline; None where it set none."""
        return None if self.deadline_s == math.inf else self.deadline_s - time.monotonic()

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """What the caller sent along."""
        return self._head.metadata()

    async def write(self, message: bytes) -> None:
        """Sends a response of a stream; waits until it is on its way."""
        if not self.open:
            return
        if not self._responding:
            self._responding = True
            self.connection.begin(self, OK_HEAD)
        self.connection.send(self, self._framed(message))
        if self.unsent:
            self._room = self._server.loop.create_future()
            await self._room

    # --- of the stream -----------------------------------------------------------------------

    def received(self, data: bytes, start: int, end: int) -> None:
        self._hold(end - start)
        while start < end and self.open:
            if not self._missing:
                start = self._begin_message(data, start, end)
            else:
                take = min(self._missing, end - start)
                self._piece(data, start, start + take)
                start += take
                self._missing -= take
                if not self._missing:
                    self.begun_s = None
                    self._message(b"".join(self._pieces))
                    self._pieces.clear()
        if self.open and self.granted < GRANT_BYTES and not self._messages:
            self.connection.grant(self, http2.STREAM_WINDOW - self.granted)

    def request_ended(self) -> None:
        if self._missing or self._prefix:
            self.refuse(StatusCode.INVALID_ARGUMENT, "request: ends in the middle of a message")
        elif isinstance(self._method, Streaming):
            self._wake()
        elif len(self._messages) != 1:
            sent = "none" if not self._messages else "several"
            self.refuse(StatusCode.UNIMPLEMENTED, f"request: takes one message, and got {sent}")
        else:
            self._start()

    def aborted(self) -> None:
        self._cancel()

    def gone(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._hold(-self._held)
        self._messages.clear()
        self._pieces.clear()
        self._server.ended(self)

    def sent(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def refuse(self, code: StatusCode, message: str, trailers: Sequence[Trailer] = ()) -> None:
        """Ends the call, wherever it is."""
        abort = Abort(code, message, trailers)
        if not self._running:
            if self._method is not None and self.open:
                self._method.refused(code)
            self._end(abort.block)
            self._cancel()  # it won't begin
        elif self._task is not None and self._task.done():  # its response is not taken
            self.connection.reset(self, CANCEL)
        elif self._why is None:
            self._why = abort
            self._cancel()

    # --- its course --------------------------------------------------------------------------

    def _open(self) -> None:
        head = self._head
        if head.method != "POST" or not GRPC.match(head.content_type):
            self._not_grpc()
        elif self._server.ending:
            self.refuse(StatusCode.UNAVAILABLE, STOPPING)
        elif head.size > HEADERS_BYTES:
            self.refuse(
                StatusCode.RESOURCE_EXHAUSTED,
                f"metadata: is {head.size:,} bytes; at most {HEADERS_BYTES:,} are allowed",
            )
        elif self._method is None:
            self.refuse(StatusCode.UNIMPLEMENTED, f"there is no method {head.path[:200]}")
        elif head.encoding and head.encoding not in ENCODINGS:
            self.refuse(
                StatusCode.UNIMPLEMENTED,
                f"grpc-encoding: is {head.encoding[:40]}; {', '.join(ENCODINGS)} are understood",
                [("grpc-accept-encoding", ",".join(ENCODINGS))],
            )
        elif head.timeout and not self._set_deadline(head.timeout_s):
            self.refuse(
                StatusCode.INVALID_ARGUMENT,
                f"grpc-timeout: is {head.timeout[:40]!r}; 1 to 8 digits and one of H, M, S, m, u "
                "and n are allowed",
            )
        elif isinstance(self._method, Streaming):
            self._start()

    def _set_deadline(self, left_s: float | None) -> bool:
        if left_s is None:
            return False
        self.deadline_s = self.arrived_s + left_s
        # The loop's clock ticks in milliseconds, and is not to end a call too early.
        self._timer = self._server.loop.call_later(left_s + 1e-3, self._expire)
        return True

    def _start(self) -> None:
        run = self._answer() if isinstance(self._method, Unary) else self._stream()
        self._task = self._server.loop.create_task(run)
        self._server.backlog.waits()

    def _cancel(self) -> None:
        if self._task is not None:
            if not self._running:
                self._server.backlog.leaves()
            self._task.cancel()

    async def _answer(self) -> None:
        assert isinstance(self._method, Unary)
        self._running = True
        self._server.backlog.begins()
        try:
            message, compressed = self._messages.popleft()
            if compressed:
                message = await self._inflated(message)
            self._hold(-self._held)
            framed = self._framed(await self._method.answer(message, self))
        except (Exception, asyncio.CancelledError) as error:
            self._failed(error)
        else:
            if self.open:
                self.connection.answer(self, OK_HEAD, framed, OK_TRAILERS)

    async def _stream(self) -> None:
        assert isinstance(self._method, Streaming)
        self._running = True
        self._server.backlog.begins()
        requests = self._requests()
        try:
            await self._method.answer(requests, self)
        except (Exception, asyncio.CancelledError) as error:
            self._failed(error)
        else:
            self._end(OK_TRAILERS)
        finally:
            with suppress(RuntimeError):  # a task of the method's, cancelled too, still reads it
                await requests.aclose()

    async def _requests(self) -> AsyncGenerator[bytes, None]:
        while True:
            while self._messages:
                message, compressed = self._messages.popleft()
                self._hold(-len(message) - MESSAGE_HEAD - MESSAGE_COST_BYTES)
                if compressed:
                    message = await self._inflated(message)
                if not self._messages and self.granted < GRANT_BYTES:
                    self.connection.grant(self, http2.STREAM_WINDOW - self.granted)
                yield message
            if self.ended:
                return
            self._awaited = self._server.loop.create_future()
            await self._awaited

    def _failed(self, error: BaseException) -> None:
        """The method raised: what was it, and what is the caller told?"""
        abort = self._why
        if isinstance(error, Abort):
            abort = error
        elif not isinstance(error, asyncio.CancelledError):
            log.error("call_failed", exc_info=error, extra={"method": self._head.path})
            abort = Abort(StatusCode.INTERNAL, "internal error")
        if self.unsent and self._why is not None:
            self.connection.reset(self, CANCEL)  # behind what is not taken no status is either
            return
        if abort is None:  # cancelled by who ends the loop, or the other end is gone
            abort = Abort(StatusCode.UNAVAILABLE, STOPPING)
        self._end(abort.block)

    def _expire(self) -> None:
        self.refuse(StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed")

    # --- messages ----------------------------------------------------------------------------

    def _begin_message(self, data: bytes, start: int, end: int) -> int:
        """Reads a message's head, and the message where all of it is here; returns where it
        stopped."""
        if self._prefix or end - start < MESSAGE_HEAD:
            take = min(MESSAGE_HEAD - len(self._prefix), end - start)
            self._prefix += data[start : start + take]
            start += take
            if len(self._prefix) < MESSAGE_HEAD:
                return start
            prefix, self._prefix = self._prefix, b""
        else:
            prefix = data[start : start + MESSAGE_HEAD]
            start += MESSAGE_HEAD
        size, limit = int.from_bytes(prefix[1:], "big"), self._server.limits.message_bytes
        if size > limit:
            self.refuse(
                StatusCode.RESOURCE_EXHAUSTED,
                f"request: is {size:,} bytes; at most {limit:,} are allowed",
            )
        elif prefix[0] > 1 or (prefix[0] and self._head.encoding not in WINDOW_BITS):
            self.refuse(
                StatusCode.INTERNAL,
                "request: is compressed, and its headers do not say how"
                if prefix[0] == 1
                else f"request: its first byte is {prefix[0]}; 0 and 1 are allowed",
            )
        else:
            self._compressed = prefix[0] == 1
            if start + size <= end:
                self._message(data[start : start + size])
                start += size
            else:
                self._missing = size
                self.begun_s = time.monotonic()
        return start

    def _piece(self, data: bytes, start: int, end: int) -> None:
        """A part of a message. What is most of what came is not copied, but kept as it came."""
        pieces, size = self._pieces, end - start
        if size >= SMALL_PIECE_BYTES:
            whole = 2 * size >= len(data)
            pieces.append(memoryview(data)[start:end] if whole else data[start:end])
        elif pieces and isinstance(pieces[-1], bytearray):
            pieces[-1] += data[start:end]
        else:
            pieces.append(bytearray(data[start:end]))

    def _message(self, message: bytes) -> None:
        if self._messages and isinstance(self._method, Unary):
            self.refuse(StatusCode.UNIMPLEMENTED, "request: takes one message, and got several")
            return
        self._messages.append((message, self._compressed))
        if isinstance(self._method, Streaming):
            self._hold(MESSAGE_COST_BYTES)
        self._wake()

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def _hold(self, size: int) -> None:
        """So many bytes more are here that nobody has read."""
        server = self._server
        self._held += size
        server.receiving_bytes += size
        if server.receiving_bytes > server.limits.receiving_bytes and size > 0:
            self.refuse(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{server.receiving_bytes:,} bytes of requests are being received; at most "
                f"{server.limits.receiving_bytes:,} are allowed",
                [("grpc-retry-pushback-ms", f"{BUSY_RETRY_S * 1e3:.0f}")],
            )

    async def _inflated(self, message: bytes) -> bytes:
        """Raises Abort. On another thread: a small message may become a large one."""
        return await asyncio.to_thread(
            _inflate, message, self._head.encoding, self._server.limits.message_bytes
        )

    def _framed(self, message: bytes) -> bytes:
        """Raises Abort where the message is too large."""
        size, limit = len(message), self._server.limits.message_bytes
        if size > limit:
            raise Abort(
                StatusCode.RESOURCE_EXHAUSTED,
                f"the response is {size:,} bytes; at most {limit:,} are allowed",
            )
        return size.to_bytes(MESSAGE_HEAD, "big") + message

    # --- ends --------------------------------------------------------------------------------

    def _end(self, trailers: bytes) -> None:
        """The last of the response, once."""
        if not self.open:
            return
        if self._responding:
            self.connection.send(self, b"", trailers)
        else:
            self.connection.begin(self, OK_HEAD + trailers, end=True)

    def _not_grpc(self) -> None:
        status = 415 if self._head.method == "POST" else 405
        self.connection.begin(self, block([("content-type", "text/plain")], status), end=True)


def _inflate(message: bytes, encoding: str, limit: int) -> bytes:
    try:
        return inflate(message, encoding, limit)
    except TooLarge as error:
        raise Abort(StatusCode.RESOURCE_EXHAUSTED, f"request: {error}") from None
    except Damaged as error:
        raise Abort(StatusCode.INVALID_ARGUMENT, f"request: {error}") from None
