"""Ends connections that are silent, idle, old or stalled, and calls that do not arrive."""

from __future__ import annotations

import random

from grpc import StatusCode

from server.telemetry.clock import clock
from server.transport.calls.calls_in_progress import CallsInProgress
from server.transport.calls.grpc_call import GrpcCall
from server.transport.http2 import frame_limits
from server.transport.http2.connection import ServerConnection

CHECK_S = 5.0  # period of the checks
PREFACE_TIMEOUT_S = 20.0  # for a connection to show that it speaks HTTP/2
SILENT_S = 60.0  # without a byte, after which the server sends a ping
PING_TIMEOUT_S = 20.0
SEND_TIMEOUT_S = 60.0  # in which a client must read something, if there is something to read
RETIRE_TIMEOUT_S = 30.0  # for a client without calls to leave after GOAWAY
AGE_JITTER = 0.1  # so that connections that opened together do not all end together

TOO_OLD = "the connection has reached its maximum age; call again on another one"


class _Watched:
    """What the last check found on one connection."""

    __slots__ = (
        "active_s",
        "delivered_bytes",
        "heard_s",
        "moved_s",
        "requests",
        "retired_s",
        "retires_s",
    )

    def __init__(self, now_s: float, max_age_s: float) -> None:
        age_s = max_age_s * random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)
        self.retires_s = now_s + age_s if max_age_s else float("inf")
        self.retired_s: float | None = None  # when it got GOAWAY
        self.heard_s = now_s  # when bytes came
        self.active_s = now_s  # when there was a call
        self.requests = 0
        self.moved_s = now_s  # when the client read something, or had nothing to read
        self.delivered_bytes = 0


class ConnectionWatch:
    """Checks the connections and calls of one server every CHECK_S seconds."""

    def __init__(self, calls: CallsInProgress[GrpcCall]) -> None:
        self._calls = calls
        self._limits = calls.limits
        self._watched: dict[ServerConnection, _Watched] = {}
        self._timer = calls.loop.call_later(CHECK_S, self._run)

    def add(self, connection: ServerConnection) -> None:
        self._watched[connection] = _Watched(clock(), self._limits.connection_age_s)

    def remove(self, connection: ServerConnection) -> None:
        self._watched.pop(connection, None)

    def stop(self) -> None:
        self._timer.cancel()

    def check(self, now_s: float) -> None:
        """Ends what has exceeded a time."""
        for connection, watched in list(self._watched.items()):
            self._check_signs_of_life(connection, watched, now_s)
            self._check_delivery(connection, watched, now_s)
            self._check_age(connection, watched, now_s)
        for call in self._calls:
            problem = call.overdue(now_s)
            if problem:
                call.refuse(StatusCode.DEADLINE_EXCEEDED, problem)

    def _run(self) -> None:
        self._timer = self._calls.loop.call_later(CHECK_S, self._run)
        self.check(clock())

    def _check_signs_of_life(
        self, connection: ServerConnection, watched: _Watched, now_s: float
    ) -> None:
        """The operating system alone would notice after two hours that a client is gone."""
        if connection.was_heard:
            connection.was_heard = False
            watched.heard_s = now_s
        silent_s = now_s - watched.heard_s
        if not connection.is_greeted:
            if silent_s > PREFACE_TIMEOUT_S:
                connection.cut(frame_limits.NO_PREFACE)
        elif silent_s > SILENT_S + PING_TIMEOUT_S:
            connection.cut(frame_limits.NO_ANSWER)
        elif silent_s > SILENT_S:
            connection.ping()

    def _check_delivery(
        self, connection: ServerConnection, watched: _Watched, now_s: float
    ) -> None:
        """A client that reads nothing holds the memory of its responses."""
        delivered = connection.sender.delivered_bytes
        if not connection.sender.has_unsent_bytes or delivered != watched.delivered_bytes:
            watched.delivered_bytes, watched.moved_s = delivered, now_s
        elif now_s - watched.moved_s > SEND_TIMEOUT_S:
            connection.cut(frame_limits.STALLED)

    def _check_age(self, connection: ServerConnection, watched: _Watched, now_s: float) -> None:
        """GOAWAY for idle and old connections, and the end of those that stay in spite of it."""
        if connection.streams or connection.requests != watched.requests:
            watched.requests, watched.active_s = connection.requests, now_s
        idle_s = now_s - watched.active_s
        is_idle = 0 < self._limits.connection_idle_s < idle_s
        if watched.retired_s is None:
            if is_idle or now_s > watched.retires_s:
                connection.retire()
                watched.retired_s = now_s
            return
        retired_s = now_s - watched.retired_s
        if 0 < self._limits.connection_age_grace_s < retired_s:
            for stream in list(connection.streams.values()):
                if isinstance(stream, GrpcCall):
                    stream.refuse(StatusCode.UNAVAILABLE, TOO_OLD)
        if retired_s > RETIRE_TIMEOUT_S and not connection.streams:
            connection.close()
