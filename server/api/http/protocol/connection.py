"""One HTTP connection: uvicorn's, with limits on what its client may cost."""

from __future__ import annotations

import asyncio
import logging
import random
from http import HTTPStatus
from typing import Any

import h11
from starlette.exceptions import HTTPException
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.http.access import PEER
from server.api.http.problem import http_problem
from server.api.http.protocol.parser import (
    DETAILS,
    INVALID,
    MAX_HEADERS,
    Http1Parser,
    RequestError,
    check_headers,
)
from server.api.http.protocol.reading import TURN_S, ReadFlow, ReadingTurns
from server.security.peer import peer_of
from server.telemetry.clock import clock
from server.transport.connection_limits import HTTP, SPEAKS_TLS, ConnectionLimits
from server.transport.http2.preface import TLS_FIRST_BYTES

# Uvicorn warns of each invalid request, and only says that there was one. The limits count them.
ERRORS_ONLY = logging.getLogger("uvicorn.error.connection")
ERRORS_ONLY.setLevel(logging.ERROR)

HEAD_S = 20.0  # for the head of a request to arrive; the gRPC port waits as long
DISCARD_S = 30.0  # for the rest of a body whose request is answered already
STALL_S = 20.0  # in which a client must read MIN_READ_BYTES of the responses that wait for it
MIN_READ_BYTES = 20 << 10

PIECE_BYTES = 1024  # given to the parser at a time; it takes 1 ms for the worst of them
BODY_PIECE_BYTES = 256 << 10  # of a body with a known length, which costs little

OLD = "connection_is_old"  # name in the state of a request
OLD_IDLE_S = 30.0  # for a request that is on its way when a connection reaches its maximum age

SLOW_HEAD, UNREAD_BODY, UNREAD_RESPONSE = "slow_head", "unread_body", "unread_response"


class HttpConnection(H11Protocol):
    """Uvicorn's connection, with limits on connections, on time, and on work in a turn of the loop.

    Uvicorn waits without limit for the head of a request and for a client that does not read. Such
    a client would hold a file descriptor that other clients need, those of the gRPC port too. A
    connection without a single byte gets as much time as one between two requests: proxies in Go
    open connections in advance, and a request that arrives as the server closes one is lost.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
        turns: ReadingTurns,
        max_age_s: float = 0.0,
    ) -> None:
        """A connection older than `max_age_s` ends with its next response; 0 is no limit."""
        super().__init__(config, server_state, app_state, _loop)
        self.conn: Http1Parser = Http1Parser()
        self.logger = ERRORS_ONLY
        self.flow: ReadFlow
        self._limits = limits
        self._turns = turns
        self._host = ""  # of the client
        self._is_admitted = False
        self._unread = b""  # bytes that wait for their turn, or for uvicorn
        self._is_waiting = False  # for a turn
        self._head_lines = 0
        self._timer: asyncio.TimerHandle | None = None  # of an incomplete head or a discarded body
        self._stall_timer: asyncio.TimerHandle | None = None
        self._max_age_s = max_age_s
        self._age_timer: asyncio.TimerHandle | None = None

    # --- events of the transport -------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = ReadFlow(transport, self._wait_for_turn)
        peer = peer_of(transport)
        self.app_state = {**self.app_state, PEER: peer}
        self._host = peer.host
        if reason := self._limits.admit(HTTP, self._host):
            self._respond(503, f"too many connections ({reason}); try again later")
            return
        self._is_admitted = True
        self._await_request()

        if self._max_age_s:  # varied, so that clients do not all come back at once
            age_s = self._max_age_s * random.uniform(0.9, 1.1)
            self._age_timer = self.loop.call_later(age_s, self._grow_old)

    def data_received(self, data: bytes) -> None:
        if self._unread or not self._turns.may_read():
            self._unread += data
            self._wait_for_turn()
        else:
            self._read(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        self._unset_keepalive_if_required()
        if self._age_timer is not None:
            self._age_timer.cancel()
        self._unread = b""
        if self._is_admitted:
            self._limits.release(HTTP, self._host)
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_for_stall()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    # --- events of requests ------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._start_timer(DISCARD_S, UNREAD_BODY)
        elif self.conn.their_state is h11.IDLE and (self.conn.trailing_data[0] or self._unread):
            self._unset_keepalive_if_required()
            self._start_timer(HEAD_S, SLOW_HEAD)

    def send_400_response(self, msg: str) -> None:
        """Refuses a request that is not valid."""
        error = self.conn.error
        self._refuse(error if error is not None else h11.RemoteProtocolError(msg))

    # --- reading -----------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """Gives the parser pieces of the data until the turn is over."""
        began_s = now_s = clock()
        start, size = 0, len(data)
        while start < size and not self.flow.read_paused and now_s - began_s < TURN_S:
            if self.transport.is_closing():
                return
            left = self.conn.body_left
            end = start + (min(left, BODY_PIECE_BYTES) if left else PIECE_BYTES)
            self._parse(data[start:end])
            start, now_s = end, clock()
        self._turns.spend(now_s - began_s)
        self._unread = data[start:]
        if self._unread:
            self._wait_for_turn()
        else:
            self.flow.let_go()

    def _parse(self, piece: bytes) -> None:
        super().data_received(piece)
        if self.conn.their_state is not h11.IDLE:
            self._head_lines = 0
            if self.cycle is None or not self.cycle.response_complete:
                self._stop_timer()
            return
        if not self.conn.trailing_data[0]:  # it ended the body of a request that is answered
            self._stop_timer()
            self._await_request()
            return
        if self._timer is None:
            self._start_timer(HEAD_S, SLOW_HEAD)
        self._head_lines += piece.count(b"\n")
        if self._head_lines > MAX_HEADERS:  # before h11 reads them: 4 us each
            try:
                check_headers(self._head_lines)
            except RequestError as error:
                self._refuse(error)

    def _await_request(self) -> None:
        """Limits the time until the first byte of a request."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _wait_for_turn(self) -> None:
        """Keeps what is unread until a later turn, or until uvicorn takes bytes again."""
        if not self._unread or self.transport.is_closing():
            return
        self.flow.hold()
        if not self._is_waiting and not self.flow.read_paused:
            self._is_waiting = True
            self._turns.wait(self._continue)

    def _continue(self) -> None:
        self._is_waiting = False
        if not self.transport.is_closing():
            data, self._unread = self._unread, b""
            self._read(data)

    # --- limits ------------------------------------------------------------------------------

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answers an invalid request, if it has no response yet, and closes the connection."""
        status, reason, detail = HTTPStatus(error.error_status_hint), INVALID, ""
        if isinstance(error, RequestError):
            reason, detail = error.reason, str(error)
        elif self.conn.trailing_data[0].startswith(TLS_FIRST_BYTES):
            reason, detail = SPEAKS_TLS, "this port speaks HTTP without TLS"
        self._limits.cut(HTTP, reason, self._host)
        self._respond(status, detail or DETAILS.get(status, DETAILS[HTTPStatus.BAD_REQUEST]))

    def _respond(self, status: int, detail: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # it must not write a response of its own
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = http_problem(HTTPException(status, detail))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(
                    status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()
                ),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _grow_old(self) -> None:
        """Lets the next response close the connection; without one it ends a while later."""
        self.app_state = {**self.app_state, OLD: True}
        self._age_timer = self.loop.call_later(OLD_IDLE_S, self._end_old)

    def _end_old(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()  # else its response closes the connection

    def _start_timer(self, seconds: float, reason: str) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._cut, reason)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_for_stall(self) -> None:
        self._stop_stall_timer()
        waiting = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._check_stall, waiting)

    def _check_stall(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - MIN_READ_BYTES:
            self._cut(UNREAD_RESPONSE)
        else:
            self._watch_for_stall()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _cut(self, reason: str) -> None:
        self._limits.cut(HTTP, reason, self._host)
        self.transport.abort()
