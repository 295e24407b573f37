"""Channel that sends unary calls. It retries nothing: a call that was not sent is UNAVAILABLE."""

from __future__ import annotations

import asyncio
from heapq import heapify, heappop, heappush

from convserve_client.errors import ServerUnreachable
from convserve_client.loadgen.event_loop import clock
from convserve_client.loadgen.wire.call import (
    DEADLINE_EXCEEDED,
    UNAVAILABLE,
    UnaryCall,
    framed,
)
from convserve_client.loadgen.wire.headers import request_block
from convserve_client.loadgen.wire.http2 import ClientConnection

CONNECT_TIMEOUT_S = 10.0
RECONNECT_DELAY_S = 0.1  # after a failed connection attempt; calls fail at once meanwhile
CLOSE_TIMEOUT_S = 1.0  # for the last bytes to be sent
TIMER_TICK_S = 0.001  # the loop's timers may be early by that much
MAX_BLOCKS = 64  # of cached header blocks, one for each timeout
MAX_DONE_DEADLINES = 1000  # entries of finished calls in the heap, beside the active ones


class Channel:
    """Sends calls of one method on one connection at a time. Belongs to one event loop.

    A call waits if there is no connection yet, or if the connection has as many streams as the
    server allows.
    """

    def __init__(self, target: str, method: str) -> None:
        """`target` is HOST:PORT."""
        host, _, port = target.rpartition(":")
        self._host, self._port = host.removeprefix("[").removesuffix("]"), int(port)
        self._target = target
        self._method = method
        self._loop = asyncio.get_running_loop()
        self._blocks: dict[float, bytes] = {}
        self._connection: ClientConnection | None = None  # for new calls
        self._connections: set[ClientConnection] = set()
        self._reconnecting: asyncio.Task[None] | None = None
        self._reconnect_from_s = 0.0
        self._waiting: dict[UnaryCall, tuple[bytes, bytes]] = {}  # header block and body
        self._deadlines: list[tuple[float, int, UnaryCall]] = []  # a heap
        self._calls_started = 0
        self._purge_at = MAX_DONE_DEADLINES  # number of started calls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0

    async def connect(self) -> None:
        """Raises ServerUnreachable."""
        why = "the server does not speak HTTP/2"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                while True:
                    try:
                        await self._connect()
                        return
                    except OSError as error:
                        why = str(error)
                    await asyncio.sleep(RECONNECT_DELAY_S)
        except TimeoutError:
            raise ServerUnreachable(
                f"no connection to {self._target} within {CONNECT_TIMEOUT_S:g} s: {why}"
            ) from None

    def start(self, call: UnaryCall, body: bytes, timeout_s: float) -> None:
        """Sends a call that is not in progress; `body` is the request, `framed`."""
        deadline_s = clock() + timeout_s
        call.begin(deadline_s)
        self._calls_started = number = self._calls_started + 1
        heappush(self._deadlines, (deadline_s, number, call))
        if self._timer is None or deadline_s < self._timer_at_s:
            self._set_timer(deadline_s)
        if number > self._purge_at:
            self._purge_deadlines()
        block = self._blocks.get(timeout_s) or self._header_block(timeout_s)
        connection = self._connection
        if connection is None or len(connection.streams) >= connection.max_streams or self._waiting:
            self._waiting[call] = block, body
            if connection is None and self._reconnecting is None:
                self._reconnect()
        else:
            call.connection = connection
            connection.open(call, block, body)

    def cancel(self, call: UnaryCall) -> None:
        """Ends a call in progress without calling its `ended`."""
        call.is_done = True
        if call.connection is None:
            del self._waiting[call]
        else:
            connection, call.connection = call.connection, None
            connection.reset(call)

    async def close(self) -> None:
        """Calls in progress end UNAVAILABLE."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
            self._reconnecting = None
        if self._timer is not None:
            self._timer.cancel()
        self._reconnect_from_s = float("inf")
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        if connections:
            closed = [connection.closed for connection in connections]
            _, slow = await asyncio.wait(closed, timeout=CLOSE_TIMEOUT_S)
            for connection in connections:
                if connection.closed in slow:
                    connection.abort()
                    await connection.closed
        self._fail_waiting("the channel was closed")

    def on_room(self, connection: ClientConnection) -> None:
        """The connection can open streams again: sends the calls that wait."""
        if self._waiting:
            while (
                self._waiting
                and connection is self._connection
                and len(connection.streams) < connection.max_streams
            ):
                call = next(iter(self._waiting))
                block, body = self._waiting.pop(call)
                call.connection = connection
                connection.open(call, block, body)
            if self._waiting and self._connection is None and self._reconnecting is None:
                self._reconnect()

    def on_leaving(self, connection: ClientConnection) -> None:
        """The connection opens no more streams: new calls need another one."""
        if self._connection is connection:
            self._connection = None
            if self._waiting and self._reconnecting is None:
                self._reconnect()

    def on_closed(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)

    def _reconnect(self) -> None:
        if clock() < self._reconnect_from_s:
            self._loop.call_soon(self._fail_waiting, f"{self._target} is unreachable")
        else:
            self._reconnecting = self._loop.create_task(self._try_to_connect())

    async def _try_to_connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._connect()
        except OSError as error:  # includes TimeoutError
            self._reconnect_from_s = clock() + RECONNECT_DELAY_S
            self._reconnecting = None
            self._fail_waiting(f"{self._target} cannot be reached: {error}")
        else:
            self._reconnecting = None
            if self._connection is not None:
                self.on_room(self._connection)

    async def _connect(self) -> None:
        _, connection = await self._loop.create_connection(
            lambda: ClientConnection(self), self._host, self._port
        )
        self._connections.add(connection)
        try:
            await connection.ready
        except BaseException:
            connection.abort()
            raise
        if not connection.is_leaving:
            self._connection = connection

    def _fail_waiting(self, why: str) -> None:
        if self._connection is None and self._reconnecting is None:
            waiting = list(self._waiting)
            self._waiting.clear()
            for call in waiting:
                call.end(UNAVAILABLE, why)

    def _set_timer(self, deadline_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_s = deadline_s
        delay_s = max(0.0, deadline_s - clock()) + TIMER_TICK_S
        self._timer = self._loop.call_later(delay_s, self._expire)

    def _expire(self) -> None:
        """Ends the calls whose deadline has passed, and sets the timer for the next deadline."""
        self._timer = None
        deadlines, now_s = self._deadlines, clock()
        while deadlines and (deadlines[0][0] <= now_s or _is_stale(deadlines[0])):
            deadline = heappop(deadlines)
            if not _is_stale(deadline):
                call = deadline[2]
                self.cancel(call)
                call.end(DEADLINE_EXCEEDED, "the deadline has passed")
        if deadlines and (self._timer is None or deadlines[0][0] < self._timer_at_s):
            self._set_timer(deadlines[0][0])

    def _purge_deadlines(self) -> None:
        """Drops the entries of finished calls."""
        self._deadlines[:] = [one for one in self._deadlines if not _is_stale(one)]
        heapify(self._deadlines)
        self._purge_at = self._calls_started + len(self._deadlines) + MAX_DONE_DEADLINES

    def _header_block(self, timeout_s: float) -> bytes:
        if len(self._blocks) >= MAX_BLOCKS:  # each retry has another timeout: the time left
            self._blocks.clear()
        block = self._blocks[timeout_s] = request_block(self._method, self._target, timeout_s)
        return block


class _AwaitedCall(UnaryCall):
    """A call that a coroutine awaits."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        super().__init__()
        self._waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        await self._waiter


async def call_and_wait(channel: Channel, message: bytes, timeout_s: float) -> UnaryCall:
    """Sends one call and returns it when it is done. Cancelling this cancels the call."""
    call = _AwaitedCall()
    channel.start(call, framed(message), timeout_s)
    try:
        await call.wait()
    except asyncio.CancelledError:
        if not call.is_done:
            channel.cancel(call)
        raise
    return call


def _is_stale(deadline: tuple[float, int, UnaryCall]) -> bool:
    """Whether the entry belongs to a call that is done or was sent again since."""
    deadline_s, _, call = deadline
    return call.is_done or call.deadline_s != deadline_s
