"""Channel that sends unary calls. It retries nothing: a call that was not sent is UNAVAILABLE."""

from __future__ import annotations

import asyncio
from typing import Any

from convserve_client.errors import ServerUnreachable, TlsError
from convserve_client.loadgen.event_loop import clock
from convserve_client.loadgen.wire.call import (
    DEADLINE_EXCEEDED,
    UNAVAILABLE,
    UnaryCall,
    framed,
)
from convserve_client.loadgen.wire.connection import ClientConnection
from convserve_client.loadgen.wire.deadlines import Deadlines
from convserve_client.loadgen.wire.headers import Header, request_headers
from convserve_client.security.access import PLAIN, Access
from convserve_client.security.connection_errors import connection_failure, tls_failure
from convserve_client.security.tls import HTTP2, TlsOptions, ssl_context
from convserve_client.security.token import bearer

CONNECT_TIMEOUT_S = 10.0
RECONNECT_DELAY_S = 0.1  # after a failed connection attempt; calls fail at once meanwhile
CLOSE_TIMEOUT_S = 1.0  # for the last bytes to be sent
TLS_SHUTDOWN_TIMEOUT_S = 0.1  # for the server's answer to the end of TLS; some never send it
MAX_HEADERS = 64  # cached, one for each timeout
MAX_CONNECTIONS = 64


class Channel:
    """Sends calls of one method. Belongs to one event loop.

    A connection carries as many calls at a time as the server allows. If there are more, the
    channel opens further connections, up to `max_connections`; meanwhile the calls wait.
    """

    def __init__(
        self,
        target: str,
        method: str,
        access: Access = PLAIN,
        *,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """`target` is HOST:PORT. Raises ValueError if a file of TLS cannot be used."""
        host, _, port = target.rpartition(":")
        self._host, self._port = host.removeprefix("[").removesuffix("]"), int(port)
        self._target = target
        self._method = method
        self._access = access
        self._tls_arguments = _tls_arguments(access.tls, self._host)
        self._max_connections = max_connections
        self._loop = asyncio.get_running_loop()
        self._headers: dict[float, tuple[Header, ...]] = {}  # by timeout
        self._usable: list[ClientConnection] = []  # for new calls
        self._current: ClientConnection | None = None  # the one of them that is tried first
        self._connections: set[ClientConnection] = set()
        self.max_connections_used = 0  # at one time
        self._connecting: asyncio.Task[None] | None = None
        self._reconnect_from_s = 0.0
        self._waiting: dict[UnaryCall, tuple[tuple[Header, ...], bytes]] = {}  # headers and body
        self._deadlines = Deadlines(self._on_expired)

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
                        why = str(error) or type(error).__name__
                    await asyncio.sleep(RECONNECT_DELAY_S)
        except TimeoutError:
            raise ServerUnreachable(
                f"no connection to {self._target} within {CONNECT_TIMEOUT_S:g} s: {why}"
            ) from None

    def start(self, call: UnaryCall, body: bytes, timeout_s: float) -> None:
        """Sends a call that is not in progress; `body` is the request, `framed`."""
        call.begin(clock() + timeout_s)
        self._deadlines.add(call)
        headers = self._headers.get(timeout_s) or self._request_headers(timeout_s)
        current = self._current
        if current is not None and not self._waiting and current.open(call, headers, body):
            call.connection = current
        elif self._waiting or not self._open_elsewhere(call, headers, body):
            self._waiting[call] = headers, body
            self._connect_soon()

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
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        self._deadlines.close()
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
        """The connection may open streams again: sends the calls that wait."""
        while self._waiting:
            call = next(iter(self._waiting))
            headers, body = self._waiting[call]
            if connection.is_leaving or not connection.open(call, headers, body):
                break
            del self._waiting[call]
            call.connection = connection
        if self._waiting:
            self._connect_soon()

    def on_leaving(self, connection: ClientConnection) -> None:
        """The connection opens no more streams: new calls need another one."""
        if connection in self._usable:
            self._usable.remove(connection)
        if connection is self._current:
            self._current = self._usable[0] if self._usable else None
        if self._waiting:
            self._connect_soon()

    def on_closed(self, connection: ClientConnection) -> None:
        self._connections.discard(connection)

    def _open_elsewhere(self, call: UnaryCall, headers: tuple[Header, ...], body: bytes) -> bool:
        """Sends the call on another connection with room. Returns False if there is none."""
        for connection in self._usable[:]:
            if connection.open(call, headers, body):
                call.connection = self._current = connection
                return True
        return False

    def _connect_soon(self) -> None:
        """Opens a connection for the calls that wait, if that can help them."""
        if self._connecting is not None:
            return
        if clock() < self._reconnect_from_s:
            if not self._usable:
                self._loop.call_soon(self._fail_waiting, f"{self._target} is unreachable")
        elif not self._usable or self._can_add_connection():
            self._connecting = self._loop.create_task(self._try_to_connect())

    def _can_add_connection(self) -> bool:
        latest = self._usable[-1]
        return len(self._usable) < self._max_connections and 0 < latest.max_streams <= len(
            latest.streams
        )

    async def _try_to_connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._connect()
        except (OSError, ServerUnreachable) as error:  # OSError includes TimeoutError
            self._reconnect_from_s = clock() + RECONNECT_DELAY_S
            self._connecting = None
            self._fail_waiting(f"{self._target} cannot be reached: {error}")
        else:
            self._connecting = None
            if self._current is not None:
                self.on_room(self._current)

    async def _connect(self) -> None:
        """Raises OSError if it may help to try again, otherwise ServerUnreachable."""
        connection = ClientConnection(self)
        try:
            transport, _ = await self._loop.create_connection(
                lambda: connection, self._host, self._port, **self._tls_arguments
            )
            self._connections.add(connection)
            self._check_protocol(transport)
            await connection.ready
        except OSError as error:
            if connection.wrong_protocol:
                raise ServerUnreachable(f"{self._target} {connection.wrong_protocol}") from error
            if why := tls_failure(str(error), self._target, self._access.tls):
                raise TlsError(why) from error
            if why := connection_failure(str(error), self._target, self._access.tls):
                raise ConnectionError(why) from error
            raise
        except BaseException:
            connection.abort()
            raise
        if not connection.is_leaving:
            self._usable.append(connection)
            self._current = connection
            self.max_connections_used = max(self.max_connections_used, len(self._usable))

    def _check_protocol(self, transport: asyncio.BaseTransport) -> None:
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != HTTP2:
            raise TlsError(f"{self._target} speaks TLS but not HTTP/2: use the port of gRPC")

    def _fail_waiting(self, why: str) -> None:
        if not self._usable and self._connecting is None:
            waiting = list(self._waiting)
            self._waiting.clear()
            for call in waiting:
                call.end(UNAVAILABLE, why)

    def _on_expired(self, call: UnaryCall) -> None:
        self.cancel(call)
        call.end(DEADLINE_EXCEEDED, "the deadline has passed")

    def _request_headers(self, timeout_s: float) -> tuple[Header, ...]:
        if len(self._headers) >= MAX_HEADERS:  # each retry has another timeout: the time left
            self._headers.clear()
        tls, token = self._access.tls, self._access.token
        headers = self._headers[timeout_s] = request_headers(
            self._method,
            (tls and tls.server_name) or self._target,
            timeout_s,
            scheme="http" if tls is None else "https",
            metadata=((b"authorization", bearer(token).encode("ascii")),) if token else (),
        )
        return headers


def _tls_arguments(tls: TlsOptions | None, host: str) -> dict[str, Any]:
    """Arguments of `create_connection`. Raises ValueError if a file cannot be used."""
    if tls is None:
        return {}
    return {
        "ssl": ssl_context(tls),
        "server_hostname": tls.server_name or host,
        "ssl_handshake_timeout": CONNECT_TIMEOUT_S,
        "ssl_shutdown_timeout": TLS_SHUTDOWN_TIMEOUT_S,
    }


class _AwaitedCall(UnaryCall):
    """A call that a coroutine awaits."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
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
