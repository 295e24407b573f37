"""The server's end of an HTTP/2 connection (RFC 9113), by libnghttp2 through ngh2.

The library reads and writes frames, decodes headers, keeps windows and stream states, and limits
what a client may do. This module connects it to the event loop: bytes in, streams, bytes out. While
a client does not read its responses, the server reads nothing more from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ngh2 import Configuration, Connection, Role
from ngh2.enums import ErrorCode, Setting
from ngh2.events import (
    ConnectionClosed,
    DataReceived,
    GoAwayReceived,
    PingAcknowledged,
    PingReceived,
    RequestReceived,
    SettingsAcknowledged,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from ngh2.exceptions import NGH2Error

from server.transport.connection_limits import SPEAKS_TLS
from server.transport.http2 import frame_limits
from server.transport.http2.closing import EMPTY_SETTINGS, Closer, fatal, goaway
from server.transport.http2.frame_audit import FrameError
from server.transport.http2.frame_limits import FrameLimits
from server.transport.http2.preface import OtherProtocol, PrefaceReader
from server.transport.http2.reading import InputReader, ReadingTurns
from server.transport.http2.stream import ResponseSender, Stream
from server.transport.http2.unsent import UnsentBytes
from server.transport.metadata import MAX_HEADERS_BYTES, Header, is_large

RETIRING = b"retiring"  # payload of the ping that follows the first GOAWAY
STREAM_WINDOW = 1 << 20  # a usual image fits without a window update
CONNECTION_WINDOW = 16 << 20
FRAME_BYTES = 256 << 10  # the largest DATA frame a client may send

# How many times its limit of streams a client may have until it has acknowledged the limit. It may
# not know it yet (RFC 9113, 6.5.3), and not every client repeats refused calls: Envoy needs a retry
# policy for that. Some never acknowledge, and few such connections must not use up --max-calls.
UNKNOWN_LIMIT_FACTOR = 2
HARD_LIMIT_FACTOR = 4  # streams above it end the connection; those between are refused

# Header blocks above these limits end the connection, because the library stops decoding there. A
# call above MAX_HEADERS_BYTES, which clients are told, or MAX_HEADER_FIELDS is refused alone.
MAX_HEADER_BLOCK_BYTES = 64 << 10
MAX_BLOCK_FIELDS = 1_000

CONFIGURATION = Configuration(
    auto_window_update=False,
    stream_reset_rate_limit=(1 << 32, 1 << 32),  # see frame_limits
    # For PRIORITY and unknown frames, empty DATA, headers that break rules; at once, each second
    glitch_rate_limit=(10_000, 1_000),
    max_inbound_header_list_size=MAX_HEADER_BLOCK_BYTES,
    max_inbound_header_count=MAX_BLOCK_FIELDS,
)

COUNTED = {
    PingReceived: frame_limits.PINGS,
    SettingsReceived: frame_limits.SETTINGS,
    StreamReset: frame_limits.RESETS,
    WindowUpdated: frame_limits.WINDOW_UPDATES,
}

# Makes the stream of a request, or returns the headers of the response that refuses it.
MakeStream = Callable[[ResponseSender, int, tuple[Header, ...]], "Stream | tuple[Header, ...]"]


class ConnectionOwner(Protocol):
    """What a connection needs from its server."""

    turns: ReadingTurns
    unsent: UnsentBytes[ResponseSender]
    max_streams: int

    def opened(self, connection: ServerConnection) -> MakeStream:
        """Takes a new connection; may close it."""

    def was_cut(self, connection: ServerConnection, reason: str) -> None:
        """Called when a connection exceeds a limit; `reason` is a word of frame_limits."""

    def closed(self, connection: ServerConnection) -> None:
        """Called once for each connection, when it is closed."""


class ServerConnection(asyncio.Protocol):
    """One connection. Used on the event loop's thread only."""

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._http2 = Connection(Role.SERVER, CONFIGURATION)
        self._reader = InputReader(self._http2, owner.turns, self._handle)
        self._limits = FrameLimits()
        self._max_streams = UNKNOWN_LIMIT_FACTOR * owner.max_streams
        self._transport: Any = None
        self.sender: Any = None  # a ResponseSender, once there is a transport
        self._closer: Any = None  # a Closer
        self._make: Any = None  # a MakeStream
        self.streams: dict[int, Stream] = {}
        self.requests = 0
        self.was_heard = True  # bytes arrived since the server last cleared this
        self.is_greeted = False
        self._preface = PrefaceReader()
        self._is_retiring = False
        self._client_leaves = False  # it has sent GOAWAY
        self._reset_id = 0  # the latest stream that the client has reset

    # --- for the loop ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        http2, streams, unsent = self._http2, self.streams, self._owner.unsent
        cut = partial(self.cut, frame_limits.UNSENT_BYTES)
        self.sender = ResponseSender(http2, transport, streams, self._on_event, unsent, cut)
        self._closer = Closer(transport, self.sender)
        self._make = self._owner.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.sender.stop()
        self._closer.closed()
        self._end_streams()
        self._owner.closed(self)

    def data_received(self, data: bytes) -> None:
        if self.sender.is_closed:
            return
        self.was_heard = True
        if not self.is_greeted:
            data = self._greet(data)
        if self._reader.is_paused:  # a turn of the loop is to continue
            self._reader.keep(data)
        elif data:
            self._read(data)

    def eof_received(self) -> bool:
        return False  # a half-closed connection is closed

    def pause_writing(self) -> None:
        """Stops reading while the client does not read its responses."""
        self.sender.pause()
        if not self.sender.is_closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.sender.is_closed:
            self.was_heard = True  # the client is alive: it reads, if slowly
            self.sender.resume()
            self._resume_reading()

    def ping(self) -> None:
        """Sends a ping, to see whether the client is alive."""
        with suppress(NGH2Error):
            self._http2.ping(b"keepaliv")
        self.sender.flush_soon()

    def retire(self) -> None:
        """Sends GOAWAY and finishes the requests in flight."""
        if not self.is_greeted:
            self.close()
        elif not self._is_retiring and not self.sender.is_closed:
            self._is_retiring = True
            with suppress(NGH2Error):
                self._http2.send_shutdown_notice()
                # The client acknowledges this ping after all requests that it sent before it got
                # the GOAWAY.
                self._http2.ping(RETIRING)
            self.sender.flush_soon()

    def close(self) -> None:
        """Closes the connection after the buffered bytes."""
        self.sender.flush()
        self._closer.close()

    def cut(self, reason: str) -> None:
        """Ends the connection of a client that exceeds a limit; `reason` is for the client too."""
        with suppress(NGH2Error):
            self._http2.send_goaway(ErrorCode.ENHANCE_YOUR_CALM, debug_data=reason.encode())
        self.sender.flush()
        self._end_with(reason)

    def reject(self, reason: str) -> None:
        """Closes a new connection, and tells the client why."""
        self._closer.close(EMPTY_SETTINGS + goaway(ErrorCode.ENHANCE_YOUR_CALM, reason))

    def abort(self) -> None:
        """Closes the connection at once."""
        self._closer.abort()

    # --- reading -----------------------------------------------------------------------------

    def _greet(self, data: bytes) -> bytes:
        """Checks the connection preface. Returns the bytes for the library, once it is complete."""
        try:
            data = self._preface.read(data)
        except OtherProtocol as error:
            self._closer.cut(error.answer)
            if error.is_tls:
                self._owner.was_cut(self, SPEAKS_TLS)
            return b""
        if data:
            self.is_greeted = True
            self._transport.write(_initiate(self._http2, self._owner.max_streams))
        return data

    def _read(self, data: bytes) -> None:
        """Reads bytes until the turn's budget is used up."""
        was_scheduled = self.sender.hold()
        try:
            self._reader.read(data) if data else self._reader.read_on()
        except (NGH2Error, FrameError) as error:
            self._end_with(*fatal(error))
            return
        self.sender.release(was_scheduled)
        if self._reader.is_paused and not self.sender.is_closed:
            self._transport.pause_reading()
            self._owner.turns.add(self._continue_reading, is_new=self._reader.is_new)

    def _continue_reading(self) -> None:
        """Reads on, in a later turn."""
        if not self.sender.is_closed:
            self._read(b"")
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self.sender.is_writable and not self._reader.is_paused and not self.sender.is_closed:
            self._transport.resume_reading()

    # --- events ------------------------------------------------------------------------------

    def _handle(self, events: list[Any]) -> None:
        """Handles events of bytes that were read."""
        streams = self.streams
        event: Any  # its kind decides which attributes it has
        for event in events:
            kind = type(event)
            if kind is DataReceived:
                stream_id, data, has_ended = event.stream_id, event.data, event.end_stream
                stream = streams.get(stream_id)
                if stream is not None and stream.open:
                    stream.received(data, has_ended)
                else:
                    self._on_unread_data(stream_id, data, has_ended)
                if not has_ended and len(data) < frame_limits.SMALL_DATA_BYTES:
                    self._count(frame_limits.SMALL_DATA)
            elif kind is RequestReceived:
                self._on_request(event.stream_id, event.headers, event.end_stream)
            else:
                self._on_event(event)

    def _on_event(self, event: Any) -> None:
        kind = type(event)
        if kind is StreamClosed:
            self._on_stream_closed(event.stream_id, event.error_code)
        elif kind is TrailersReceived:
            _end_request(self.streams.get(event.stream_id))
        elif kind in COUNTED:
            if kind is StreamReset:
                self._reset_id = event.stream_id
            elif kind is SettingsReceived and Setting.MAX_HEADER_LIST_SIZE in event.settings:
                self.sender.limit_headers(event.settings[Setting.MAX_HEADER_LIST_SIZE])
            self.sender.flush_soon()  # windows may have opened
            self._count(COUNTED[kind])
        elif kind is PingAcknowledged:
            if event.opaque_data == RETIRING and self._is_retiring:
                with suppress(NGH2Error):
                    self._http2.send_goaway()
                self.sender.flush_soon()
        elif kind is SettingsAcknowledged:
            self._max_streams = self._owner.max_streams
        elif kind is GoAwayReceived:
            self._client_leaves = True
        elif kind is ConnectionClosed:
            asyncio.get_running_loop().call_soon(self._on_connection_closed, event.error_code)

    def _on_request(self, stream_id: int, headers: tuple[Header, ...], has_ended: bool) -> None:
        if self.sender.is_closed:  # cut by an event before this one
            return
        self.requests += 1
        if len(self.streams) >= self._max_streams:
            self.sender.reset(stream_id, ErrorCode.REFUSED_STREAM)
            return
        stream = self._make(self.sender, stream_id, headers)
        if isinstance(stream, tuple):
            self.sender.refuse(stream_id, stream, has_ended)
            if is_large(headers):
                self._count(frame_limits.LARGE_HEADERS)
        else:
            self.streams[stream_id] = stream
            if has_ended:
                _end_request(stream)

    def _on_unread_data(self, stream_id: int, data: bytes, has_ended: bool) -> None:
        if data:  # not read, but the connection's window counts it
            self.sender.consume(stream_id, len(data))
        if has_ended:
            self.sender.request_ended(stream_id)
            _end_request(self.streams.get(stream_id))

    def _on_stream_closed(self, stream_id: int, error_code: int) -> None:
        """The stream is complete, or was reset by either side."""
        self.sender.forget(stream_id)
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            _end(stream)
        if error_code and stream_id != self._reset_id:  # the server has reset it
            self._count(frame_limits.RESETS)
        if self._is_retiring and not self.streams:
            self.sender.flush_soon()

    def _count(self, kind: str) -> None:
        """Counts a frame of the client. Cuts the connection if there are too many."""
        if not self._limits.allows(kind, self.sender.work(self.requests)):
            self.cut(kind)

    def _on_connection_closed(self, error_code: int) -> None:
        """The library has sent the last GOAWAY, or the client has left."""
        self.sender.flush()
        if error_code and not self._client_leaves:
            is_flood = error_code == ErrorCode.ENHANCE_YOUR_CALM
            self._end_with(frame_limits.FLOOD if is_flood else frame_limits.PROTOCOL_ERROR)
        else:
            self._closer.close()

    def _end_with(self, reason: str, last_bytes: bytes = b"") -> None:
        if not self.sender.is_closed:
            self._closer.cut(last_bytes)
            self._end_streams()
            self._owner.was_cut(self, reason)

    def _end_streams(self) -> None:
        self._reader.stop()
        while self.streams:
            _end(self.streams.popitem()[1])


def _end_request(stream: Stream | None) -> None:
    if stream is not None:
        stream.ended = True
        if stream.open:
            stream.request_ended()


def _initiate(http2: Connection, max_streams: int) -> bytes:
    """The server's settings.

    libnghttp2 ends the connection of a client with more streams than these say. So it gets to know
    a higher limit than the client, and the server refuses the streams between the two.
    """
    hard_limit = HARD_LIMIT_FACTOR * max_streams
    http2.initiate_connection(
        {
            Setting.MAX_CONCURRENT_STREAMS: hard_limit,
            Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            Setting.MAX_FRAME_SIZE: FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADERS_BYTES,
        }
    )
    http2.set_local_window_size(CONNECTION_WINDOW)
    return http2.data_to_send().replace(_max_streams(hard_limit), _max_streams(max_streams), 1)


def _max_streams(value: int) -> bytes:
    """An entry of a SETTINGS frame."""
    return Setting.MAX_CONCURRENT_STREAMS.to_bytes(2, "big") + value.to_bytes(4, "big")


def _end(stream: Stream) -> None:
    """Ends a stream that is closed."""
    was_open, stream.open = stream.open, False
    stream.gone()
    if was_open:
        stream.aborted()
