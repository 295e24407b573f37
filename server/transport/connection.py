"""The server's end of an HTTP/2 connection (RFC 9113), by libnghttp2 through ngh2.

The library reads and writes frames, decodes headers, keeps windows and stream states, and limits
what a client may do. This module connects it to the event loop: bytes in, streams, bytes out.

One connection never holds the loop for long: it reads for at most TURN_BUDGET_S, then pauses and
continues in a later turn of the loop. While a client does not read its responses, the server reads
nothing more from it.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ngh2 import Configuration, Connection, Role
from ngh2.enums import ErrorCode, Setting
from ngh2.events import (
    ConnectionClosed,
    DataReceived,
    PingAcknowledged,
    RequestReceived,
    StreamClosed,
    TrailersReceived,
    WindowUpdated,
)
from ngh2.exceptions import ConnectionStateError, DenialOfServiceError, NGH2Error

from server.transport.metadata import MAX_HEADERS_BYTES, Header, RequestHead, RequestHeads

RETIRING = b"retiring"  # payload of the ping that follows the first GOAWAY
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP1_ANSWER = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\n"
    b"content-type: text/plain\r\nconnection: close\r\n\r\n"
    b"This port speaks gRPC, over HTTP/2. REST, /metrics and /readyz are at the HTTP port.\n"
)

STREAM_WINDOW = 1 << 20  # a usual image fits without a window update
CONNECTION_WINDOW = 16 << 20
FRAME_BYTES = 256 << 10  # the largest DATA frame a client may send

# Header blocks above these limits end the connection, because the library stops decoding there. A
# call above MAX_HEADERS_BYTES, which clients are told, is refused alone.
MAX_HEADER_BLOCK_BYTES = 32 << 10
MAX_HEADER_FIELDS = 400

TURN_BUDGET_S = 0.002
EVENTS_PER_CHECK = 64

# The library reads a slice of input at once, and a frame that ends in another slice costs a copy. A
# slice grows while the client's bytes are cheap to read. An expensive one makes the next one small.
MIN_SLICE_BYTES = 16 << 10
FIRST_SLICE_BYTES = 64 << 10
MAX_SLICE_BYTES = 256 << 10
CHEAP_SLICE_S = TURN_BUDGET_S / 8

GOAWAY_HEAD = b"\x07\0\0\0\0\0"  # type, flags, stream

# Makes the stream of a request, or returns the headers that refuse it.
MakeStream = Callable[["ServerConnection", int, RequestHead], "Stream | tuple[Header, ...]"]


class Stream(ABC):
    """A request and its response. Methods run on the loop's thread and do not block."""

    __slots__ = ("connection", "ended", "open", "stream_id")

    def __init__(self, connection: ServerConnection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.ended = False  # the client has sent the whole request
        self.open = True  # a response may still be sent

    @abstractmethod
    def received(self, data: bytes, is_last: bool) -> None:
        """Handles bytes of the request's body. The stream must `consume` them at some time."""

    @abstractmethod
    def request_ended(self) -> None:
        """Handles the end of a request without further bytes."""

    @abstractmethod
    def aborted(self) -> None:
        """Handles a reset or a lost connection, unless the response is complete."""

    @abstractmethod
    def gone(self) -> None:
        """Releases what the stream holds. Called once, however it ended."""

    def sent(self) -> None:  # noqa: B027  optional
        """Called after a `send` that returned False, when its data has been sent."""


class PausedConnections:
    """Queue of connections with bytes that wait to be read.

    In each turn of the loop one of them reads. So many busy connections do not hold the loop for
    longer than one, and a client that sends little does not wait for them.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[ServerConnection] = deque()

    def add(self, connection: ServerConnection) -> None:
        if not self._waiting:
            self._loop.call_soon(self._run)
        self._waiting.append(connection)

    def _run(self) -> None:
        connection = self._waiting.popleft()
        if self._waiting:
            self._loop.call_soon(self._run)
        connection.continue_reading()


class ServerConnection(asyncio.Protocol):
    """One connection. Used on the event loop's thread only.

    `make` makes the stream of each request. `opened` and `closed` are called with the connection.
    """

    def __init__(
        self,
        make: MakeStream,
        opened: Callable[[ServerConnection], None],
        closed: Callable[[ServerConnection], None],
        paused: PausedConnections,
        max_streams: int,
    ) -> None:
        self._make = make
        self._opened = opened
        self._closed = closed
        self._paused = paused
        self._max_streams = max_streams
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._http2 = Connection(Role.SERVER, CONFIGURATION)
        self._heads = RequestHeads()
        self.streams: dict[int, Stream] = {}
        self.was_heard = True  # bytes arrived since the server last cleared this
        self.is_greeted = False
        self._preface = b""  # its start, until it is complete
        self._unread = b""  # bytes that a later turn reads
        self._events: list[Any] = []  # events that a later turn handles
        self._slice_bytes = FIRST_SLICE_BYTES
        self._is_paused = False  # a later turn continues to read
        self._is_flush_scheduled = False
        self._is_writable = True  # the transport's buffer is not full
        self._waiting: set[int] = set()  # streams that wait for `sent`
        self._early: set[int] = set()  # streams whose response ends before their request
        self._is_retiring = False
        self._is_closed = False

    # --- for the loop ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closed = True
        self._end_streams()
        self._closed(self)

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        self.was_heard = True
        if not self.is_greeted:
            data = self._greet(data)
        if self._is_paused:  # a turn of the loop is to continue
            self._unread += data
        elif data:
            self._read(data)

    def eof_received(self) -> bool:
        return False  # a half-closed connection is closed

    def pause_writing(self) -> None:
        """Stops reading while the client does not read its responses."""
        self._is_writable = False
        if not self._is_closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_writable = True
        if not self._is_closed:
            self.was_heard = True  # the client is alive: it reads, if slowly
            self._flush()
            if not self._is_paused and not self._is_closed:
                self._transport.resume_reading()

    # --- for streams -------------------------------------------------------------------------
    #
    # The library may have closed a stream before its event is handled here, so a send can fail. The
    # event follows and ends the stream.

    def answer(
        self, stream: Stream, head: Sequence[Header], body: bytes, trailers: Sequence[Header]
    ) -> None:
        """Sends a whole response."""
        if self._is_closed:
            return
        stream_id = stream.stream_id
        try:
            self._http2.send_response(stream_id, head)
            self._http2.send_data(stream_id, body)
            self._http2.send_trailers(stream_id, trailers)
        except NGH2Error:
            return
        stream.open = False
        if not stream.ended:
            self._early.add(stream_id)
        if len(self.streams) == 1:
            self._flush()  # no other response could share the write
        elif not self._is_flush_scheduled:
            self._flush_soon()

    def begin(self, stream: Stream, head: Sequence[Header], *, end: bool = False) -> None:
        """Sends the headers of a response; with `end` they are all of it."""
        if self._is_closed:
            return
        try:
            self._http2.send_response(stream.stream_id, head, end_stream=end)
        except NGH2Error:
            return
        if end:
            self._finish(stream)
        self._flush_soon()

    def send(self, stream: Stream, data: bytes) -> bool:
        """Sends a part of a response's body.

        Returns False if an earlier part waits for the client. Then `stream.sent` is called when all
        parts have been sent.
        """
        if self.has_unsent(stream):
            self._flush()
        waits = self.has_unsent(stream)
        if self._is_closed or not stream.open:
            return True
        try:
            self._http2.send_data(stream.stream_id, data)
        except NGH2Error:
            return True
        if waits:
            self._waiting.add(stream.stream_id)
        self._flush_soon()
        return not waits

    def end(self, stream: Stream, trailers: Sequence[Header]) -> None:
        """Sends the trailers of a response, after its body."""
        if self._is_closed:
            return
        try:
            self._http2.send_trailers(stream.stream_id, trailers)
        except NGH2Error:
            return
        self._finish(stream)

    def has_unsent(self, stream: Stream) -> bool:
        """Whether a part of the response's body waits to be sent."""
        return not self._is_closed and self._http2.queued_body_size(stream.stream_id) > 0

    def cancel(self, stream: Stream) -> None:
        """Resets a stream whose response the client does not read."""
        stream.open = False
        if not self._is_closed:
            self._http2.reset_stream(stream.stream_id, ErrorCode.CANCEL)
            self._flush_soon()

    def consume(self, stream_id: int, size: int) -> None:
        """Lets the client send `size` more bytes."""
        if not self._is_closed:
            try:
                self._http2.acknowledge_received_data(size, stream_id)
            except NGH2Error:  # the session is terminating
                return
            if not self._is_flush_scheduled:
                self._flush_soon()

    # --- for the server ----------------------------------------------------------------------

    def ping(self) -> None:
        """Sends a ping, to see whether the client is alive."""
        self._http2.ping(b"keepaliv")
        self._flush_soon()

    def retire(self) -> None:
        """Sends GOAWAY and finishes the requests in flight."""
        if not self.is_greeted:
            self.close()
        elif not self._is_retiring and not self._is_closed:
            self._is_retiring = True
            self._http2.send_shutdown_notice()
            # The client acknowledges this ping after all requests that it sent before it got the
            # GOAWAY.
            self._http2.ping(RETIRING)
            self._flush_soon()

    def close(self) -> None:
        """Closes the connection after the buffered bytes."""
        if not self._is_closed:
            self._flush()
        if not self._is_closed:
            self._is_closed = True
            self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._is_closed = True
        self._transport.abort()

    # --- reading -----------------------------------------------------------------------------

    def _greet(self, data: bytes) -> bytes:
        """Checks the connection preface. Returns the bytes for the library, once it is complete."""
        data = self._preface + data
        if not data.startswith(PREFACE[: len(data)]):
            if data[:1].isalpha():
                self._transport.write(HTTP1_ANSWER)
            self._is_closed = True
            self._transport.close()
            return b""
        if len(data) < len(PREFACE):
            self._preface = data
            return b""
        self.is_greeted = True
        self._preface = b""
        self._http2.initiate_connection(
            {
                Setting.MAX_CONCURRENT_STREAMS: self._max_streams,
                Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                Setting.MAX_FRAME_SIZE: FRAME_BYTES,
                Setting.MAX_HEADER_LIST_SIZE: MAX_HEADERS_BYTES,
            }
        )
        self._http2.set_local_window_size(CONNECTION_WINDOW)
        self._flush_soon()
        return data

    def _read(self, data: bytes) -> None:
        """Reads bytes until the turn's budget is used up."""
        # A flush that is scheduled now would run before the tasks of the calls that start here.
        was_scheduled, self._is_flush_scheduled = self._is_flush_scheduled, True
        self._is_paused = not self._read_slices(data)
        self._is_flush_scheduled = was_scheduled
        if not self._is_closed:
            if self._early or self._http2.want_write:
                self._flush_soon()
            if self._is_paused:
                self._transport.pause_reading()
                self._paused.add(self)

    def _read_slices(self, data: bytes) -> bool:
        """Returns whether all was read; if not, `_unread` and `_events` hold the rest."""
        now_s = time.monotonic()
        until_s = now_s + TURN_BUDGET_S
        start, size = 0, len(data)
        is_done = not self._events or self._handle_events(until_s)
        while is_done and start < size and not self._is_closed:
            length = min(self._slice_bytes, size - start)
            try:
                if length < size:
                    self._http2.receive_data(memoryview(data)[start : start + length])
                else:
                    self._http2.receive_data(data)
            except ConnectionStateError:  # it is closing: the library ignores the client
                return True
            except NGH2Error as error:
                self._fail(error)
                return True
            start += length
            self._events = self._http2.events()
            is_done = self._handle_events(until_s)
            began_s, now_s = now_s, time.monotonic()
            if now_s - began_s > TURN_BUDGET_S / 2:
                self._slice_bytes = MIN_SLICE_BYTES
            elif length == self._slice_bytes and now_s - began_s < CHEAP_SLICE_S:
                self._slice_bytes = min(2 * length, MAX_SLICE_BYTES)
            is_done = is_done and (start >= size or now_s < until_s)
        self._unread = data[start:]
        return is_done

    def _handle_events(self, until_s: float) -> bool:
        """Handles `_events`. Returns False if the time is over; then `_events` is the rest."""
        events = self._events
        for first in range(0, len(events), EVENTS_PER_CHECK):
            if first and time.monotonic() > until_s:
                self._events = events[first:]
                return False
            event: Any  # its kind decides which attributes it has
            for event in events[first : first + EVENTS_PER_CHECK]:
                kind = type(event)
                if kind is DataReceived:
                    stream = self.streams.get(event.stream_id)
                    if stream is not None and stream.open:
                        stream.received(event.data, event.end_stream)
                    else:
                        self._on_unread_data(event.stream_id, event.data, event.end_stream)
                elif kind is RequestReceived:
                    self._on_request(event.stream_id, event.headers, event.end_stream)
                else:
                    self._handle(event)
        self._events = []
        return True

    def continue_reading(self) -> None:
        """Reads on, in a later turn."""
        if self._is_closed:
            return
        unread, self._unread = self._unread, b""
        self._read(unread)
        if not self._is_paused and self._is_writable and not self._is_closed:
            self._transport.resume_reading()

    def _handle(self, event: Any) -> None:
        kind = type(event)
        if kind is StreamClosed:
            self._on_stream_closed(event.stream_id)
        elif kind is TrailersReceived:
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                self._end_request(stream)
        elif kind is WindowUpdated:
            self._flush_soon()
        elif kind is PingAcknowledged:
            if event.opaque_data == RETIRING and self._is_retiring:
                self._http2.send_goaway()
                self._close_if_retired()
        elif kind is ConnectionClosed:
            self._loop.call_soon(self.close)

    def _on_request(self, stream_id: int, headers: tuple[Header, ...], end_stream: bool) -> None:
        stream = self._make(self, stream_id, self._heads.read(headers))
        if isinstance(stream, tuple):
            with suppress(NGH2Error):
                self._http2.send_response(stream_id, stream, end_stream=True)
            if not end_stream:
                self._early.add(stream_id)
            self._flush_soon()
            return
        self.streams[stream_id] = stream
        if end_stream:
            self._end_request(stream)

    def _on_unread_data(self, stream_id: int, data: bytes, end_stream: bool) -> None:
        if data:  # not read, but the connection's window counts it
            self.consume(stream_id, len(data))
        if end_stream:
            self._early.discard(stream_id)
            stream = self.streams.get(stream_id)
            if stream is not None:
                stream.ended = True

    def _end_request(self, stream: Stream) -> None:
        stream.ended = True
        if stream.open:
            stream.request_ended()

    def _on_stream_closed(self, stream_id: int) -> None:
        """The stream is complete, or was reset by either side."""
        if self._early:
            self._early.discard(stream_id)
        if self._waiting:
            self._waiting.discard(stream_id)
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            was_open, stream.open = stream.open, False
            stream.gone()
            if was_open:
                stream.aborted()
        if self._is_retiring:
            self._close_if_retired()

    # --- ends --------------------------------------------------------------------------------

    def _finish(self, stream: Stream) -> None:
        """A whole response is queued."""
        stream.open = False
        if not stream.ended:
            self._early.add(stream.stream_id)
        self._flush_soon()

    def _close_if_retired(self) -> None:
        if self._is_retiring and not self.streams and not self._is_closed:
            self._flush_soon()

    def _fail(self, error: Exception) -> None:
        """Ends a connection whose client broke the protocol or exceeded a limit."""
        code = ErrorCode.PROTOCOL_ERROR
        if isinstance(error, DenialOfServiceError):
            code = ErrorCode.ENHANCE_YOUR_CALM
        self._is_closed = True
        payload = bytes(4) + code.to_bytes(4, "big") + str(error).encode()[:200]
        # The library has no session left that could write the frame.
        self._transport.write(len(payload).to_bytes(3, "big") + GOAWAY_HEAD + payload)
        self._transport.close()

    def _end_streams(self) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.open = False
            stream.gone()
            stream.aborted()

    # --- writing -----------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Schedules a write; all that is queued in one turn of the loop is sent together."""
        if not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_scheduled = False
        while self._is_writable and not self._is_closed and self.is_greeted:
            data = self._http2.data_to_send()
            if data:
                self._transport.write(data)
            event: Any
            for event in self._http2.events():
                if type(event) is StreamClosed:
                    self._on_stream_closed(event.stream_id)
                else:
                    self._handle(event)
            if not (self._early or self._waiting) or not self._after_write():
                return

    def _after_write(self) -> bool:
        """Handles what follows from written data. Returns whether there is more to write."""
        if self._waiting:
            for stream_id in [
                one for one in self._waiting if not self._http2.queued_body_size(one)
            ]:
                self._waiting.discard(stream_id)
                stream = self.streams.get(stream_id)
                if stream is not None:
                    stream.sent()
        has_resets = False
        for stream_id in [one for one in self._early if not self._http2.queued_body_size(one)]:
            # The response is complete. RFC 9113, 8.1: the client need not send the rest.
            self._early.discard(stream_id)
            try:
                self._http2.reset_stream(stream_id, ErrorCode.NO_ERROR)
            except NGH2Error:
                continue
            has_resets = True
        return has_resets


# Clients with short deadlines, and proxies with many users, cancel hundreds of calls a second.
RESET_BURST, RESETS_PER_S = 2_000, 1_000

CONFIGURATION = Configuration(
    auto_window_update=False,
    stream_reset_rate_limit=(RESET_BURST, RESETS_PER_S),
    max_inbound_header_list_size=MAX_HEADER_BLOCK_BYTES,
    max_inbound_header_count=MAX_HEADER_FIELDS,
)
