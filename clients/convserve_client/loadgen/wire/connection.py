"""The client's end of an HTTP/2 connection (RFC 9113), by libnghttp2 through ngh2.

The library reads and writes frames, encodes and decodes headers, and keeps windows and the states
of streams. This module connects it to the event loop. A stream is one request and one response.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from ngh2 import Configuration, Connection, Role
from ngh2.enums import ErrorCode, Setting
from ngh2.events import (
    ConnectionClosed,
    DataReceived,
    GoAwayReceived,
    ResponseReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)
from ngh2.exceptions import NGH2Error

from convserve_client.loadgen.wire.headers import Header, ResponseHead, ResponseHeads
from convserve_client.security.connection_errors import ANSWERS_IN_HTTP1, EXPECTS_TLS

MAX_HEADERS_BYTES = 64 << 10  # of a response, as HTTP/2 counts them

# Our windows. All data is read at once, so they are wide.
STREAM_WINDOW = 8 << 20
CONNECTION_WINDOW = 256 << 20

# After this many requests, output is written before the loop's turn ends, so that the server can
# start to work. Measured with 64 callers of LeNet-5 on two cores: a sixth more answers per second
# than with one write at the end of the turn. 8 give no more, and cost 5 % more CPU time.
REQUESTS_PER_WRITE = 16
BYTES_PER_WRITE = 64 << 10  # a longer output costs more to copy, because it leaves the CPU's cache

NO_LIMIT = 1 << 31

CONFIGURATION = Configuration(
    max_inbound_header_list_size=MAX_HEADERS_BYTES,
    # The library counts each answer that comes after its deadline as two glitches. An overloaded
    # server sends thousands of them in a second.
    glitch_rate_limit=(NO_LIMIT, NO_LIMIT),
)

TLS_ALERT = b"\x15\x03"
HTTP1 = b"HTTP/1."


class Stream(ABC):
    """A request and its response. Methods are called on the event loop and must not block."""

    __slots__ = ("stream_id",)

    stream_id: int  # set when the stream is opened

    @abstractmethod
    def headers(self, head: ResponseHead) -> None:
        """Headers of the response."""

    @abstractmethod
    def received(self, data: bytes) -> None:
        """Part of the response's body."""

    @abstractmethod
    def response_ended(self, trailers: ResponseHead) -> None:
        """The response is complete and the stream is closed.

        Trailers are empty if there are none. They are the only headers if nothing else came.
        """

    @abstractmethod
    def failed(self, code: int | None, why: str) -> None:
        """The stream failed with an HTTP/2 error code, or None if its connection failed."""


class ConnectionOwner(Protocol):
    """Opens streams on a connection; the connection reports its state to it."""

    def on_room(self, connection: ClientConnection) -> None:
        """The connection may have room for further streams."""

    def on_leaving(self, connection: ClientConnection) -> None:
        """No more streams can be opened. Open streams continue."""

    def on_closed(self, connection: ClientConnection) -> None: ...


NO_TRAILERS = ResponseHead()


class ClientConnection(asyncio.Protocol):
    """Client connection. Everything happens on the event loop's thread.

    Await `ready` before opening a stream; it raises ConnectionError. `closed` is done when the
    connection has ended.
    """

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.streams: dict[int, Stream] = {}
        self.max_streams = NO_LIMIT
        self.is_leaving = False  # no more streams can be opened
        self._transport: Any = None
        self._http2 = Connection(Role.CLIENT, CONFIGURATION)
        self._heads = ResponseHeads()
        self._trailers = ResponseHeads()
        self._unwritten = 0  # requests since the last write
        self._unwritten_bytes = 0  # of their bodies
        self._is_flush_scheduled = False
        self._is_writable = True  # the transport's buffer is not full
        self._is_closed = False
        self.wrong_protocol = ""  # what the server does instead of HTTP/2
        self._why = "the connection was closed"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if transport.get_extra_info("ssl_object") is None:
            # Otherwise uvloop writes at the end of the turn.
            self._transport.set_write_buffer_limits(0)
        self._http2.initiate_connection(
            {
                Setting.ENABLE_PUSH: 0,
                Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                Setting.MAX_HEADER_LIST_SIZE: MAX_HEADERS_BYTES,
            }
        )
        self._http2.set_local_window_size(CONNECTION_WINDOW)
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closed = True
        if error is not None:
            self._why = str(error) or type(error).__name__
        self._leave()
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(self._why))
            self.ready.exception()  # marks it as retrieved, because no task may be waiting
        self._fail_all()
        self._owner.on_closed(self)
        self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        if not self.ready.done() and (wrong := other_protocol(data)):
            self.wrong_protocol = self._why = wrong
            self._end()
            return
        self._is_flush_scheduled = True  # one write for all that follows from this data
        try:
            self._http2.receive_data(data)
        except NGH2Error as error:
            self._handle(self._http2.events())  # what came before the fault
            self._why = f"the server violated HTTP/2: {error}"
            self._end()
            return
        self._handle(self._http2.events())
        self._flush()
        if self.is_leaving and not self.streams:
            self.close()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._flush()
        self._owner.on_room(self)

    def open(self, stream: Stream, headers: Sequence[Header], body: bytes) -> bool:
        """Sends a request as far as the server's windows allow, the rest later.

        Returns False if there is no room: the server allows no more streams, does not read, or
        closes the connection.
        """
        if self.is_leaving or not self._is_writable or len(self.streams) >= self.max_streams:
            return False
        try:
            stream_id = self._http2.send_request(headers)
        except NGH2Error:  # its event is still to be handled
            self._leave()
            return False
        self._http2.send_data(stream_id, body, end_stream=True)
        stream.stream_id = stream_id
        self.streams[stream_id] = stream
        self._unwritten += 1
        self._unwritten_bytes += len(body)
        if self._unwritten >= REQUESTS_PER_WRITE or self._unwritten_bytes >= BYTES_PER_WRITE:
            self._write()
        elif not self._is_flush_scheduled:
            self._flush_soon()
        return True

    def reset(self, stream: Stream) -> None:
        """Closes an open stream without calling its `failed`."""
        del self.streams[stream.stream_id]
        self._reset(stream.stream_id)
        if not self.is_leaving:
            self._owner.on_room(self)
        elif not self.streams:
            self._loop.call_soon(self.close)

    def close(self) -> None:
        """Closes the connection after all output is written."""
        if self._is_closed:
            return
        self._leave()
        with suppress(NGH2Error):
            self._http2.terminate_connection()
        self._write()
        self._end()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def _handle(self, events: list[Any]) -> None:
        streams = self.streams
        for event in events:
            kind = type(event)
            if kind is StreamClosed:  # usually after its whole response
                stream = streams.pop(event.stream_id, None)
                if stream is not None:
                    self._on_closed_stream(stream, event)
            elif kind is DataReceived:
                stream = streams.get(event.stream_id)
                if stream is not None:
                    stream.received(event.data)
                    if event.end_stream and event.stream_id in streams:  # it may have given up
                        self._end_stream(stream, NO_TRAILERS)
            elif kind is ResponseReceived:
                stream = streams.get(event.stream_id)
                if stream is not None:
                    heads, headers = self._heads, event.headers
                    head = heads.latest if headers == heads.latest_headers else heads.read(headers)
                    if event.end_stream:
                        self._end_stream(stream, head)
                    else:
                        stream.headers(head)
            elif kind is TrailersReceived:
                stream = streams.get(event.stream_id)
                if stream is not None:
                    heads, headers = self._trailers, event.headers
                    head = heads.latest if headers == heads.latest_headers else heads.read(headers)
                    self._end_stream(stream, head)
            else:
                self._handle_rare(event)
        if not self.is_leaving:
            self._owner.on_room(self)

    def _handle_rare(self, event: Any) -> None:
        kind = type(event)
        if kind is SettingsReceived:
            self.max_streams = event.settings.get(Setting.MAX_CONCURRENT_STREAMS, self.max_streams)
            if not self.ready.done():
                self.ready.set_result(None)
        elif kind is StreamReset:
            stream = self.streams.pop(event.stream_id, None)
            if stream is not None:
                code = event.error_code
                stream.failed(code, f"the server ended the stream with code {code}")
        elif kind is GoAwayReceived:
            if event.error_code != ErrorCode.NO_ERROR:
                text = event.debug_data[:200].decode("utf-8", "replace")
                self._why = f"the server ended the connection with code {event.error_code}: {text}"
            self._leave()
        elif kind is ConnectionClosed:
            if self.streams or not self.ready.done():  # the library ended it, not the server
                text = event.debug_data.decode("utf-8", "replace")
                self._why = f"the server violated HTTP/2: {text}"
            self._end()

    def _on_closed_stream(self, stream: Stream, event: Any) -> None:
        """The library closed a stream that has no whole response."""
        if event.local_error is not None:
            stream.failed(None, f"the request was not sent: {event.local_error}")
        elif self.is_leaving and event.error_code == ErrorCode.REFUSED_STREAM:
            stream.failed(None, "the server takes no more calls on this connection")
        else:
            stream.failed(event.error_code, "the response violates HTTP/2")

    def _end_stream(self, stream: Stream, trailers: ResponseHead) -> None:
        del self.streams[stream.stream_id]
        if self._http2.queued_body_size(stream.stream_id):
            self._reset(stream.stream_id)  # the server answered before it read the whole request
        stream.response_ended(trailers)

    def _leave(self) -> None:
        if not self.is_leaving:
            self.is_leaving = True
            self._owner.on_leaving(self)

    def _end(self) -> None:
        """Ends all streams, and closes the connection after all output is written."""
        self._is_closed = True
        self._leave()
        self._transport.close()
        self._fail_all()

    def _fail_all(self) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.failed(None, self._why)

    def _reset(self, stream_id: int) -> None:
        with suppress(NGH2Error):  # the library has closed the connection
            self._http2.reset_stream(stream_id, ErrorCode.CANCEL)
        if not self._is_flush_scheduled:
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Schedules a write; all that is queued in one turn of the loop is sent together."""
        self._is_flush_scheduled = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        self._write()
        events = self._http2.events()
        if events:
            self._handle(events)

    def _write(self) -> None:
        """Writes what the library has to send. Its events wait for the next `_flush`."""
        self._unwritten = self._unwritten_bytes = 0
        if self._is_writable and not self._is_closed:
            data = self._http2.data_to_send()
            if data:
                self._transport.write(data)


def other_protocol(data: bytes) -> str:
    """What a server does that does not speak HTTP/2, from its first bytes; otherwise empty."""
    if data.startswith(TLS_ALERT):
        return EXPECTS_TLS
    if data.startswith(HTTP1):
        return ANSWERS_IN_HTTP1
    return ""
