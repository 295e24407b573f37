"""The server's end of an HTTP/2 connection (RFC 9113), by libnghttp2 through ngh2.

The library reads and writes frames, decodes headers, keeps windows and stream states, and limits
what a client may do. This module connects it to the event loop: bytes in, streams, bytes out. While
a client does not read its responses, the server reads nothing more from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
from ngh2.exceptions import DenialOfServiceError, NGH2Error

from server.transport.http2.reading import InputReader, ReadingTurns
from server.transport.http2.stream import ResponseSender, Stream
from server.transport.metadata import MAX_HEADERS_BYTES, Header

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

# Clients with short deadlines, and proxies with many users, cancel hundreds of calls a second.
RESET_BURST, RESETS_PER_S = 2_000, 1_000

CONFIGURATION = Configuration(
    auto_window_update=False,
    stream_reset_rate_limit=(RESET_BURST, RESETS_PER_S),
    max_inbound_header_list_size=MAX_HEADER_BLOCK_BYTES,
    max_inbound_header_count=MAX_HEADER_FIELDS,
)

GOAWAY_HEAD = b"\x07\0\0\0\0\0"  # type, flags, stream

# Makes the stream of a request, or returns the headers of the response that refuses it.
MakeStream = Callable[[ResponseSender, int, tuple[Header, ...]], "Stream | tuple[Header, ...]"]


class ServerConnection(asyncio.Protocol):
    """One connection. Used on the event loop's thread only.

    `make` makes the stream of each request. `opened` and `closed` are called with the connection.
    """

    def __init__(
        self,
        make: MakeStream,
        opened: Callable[[ServerConnection], None],
        closed: Callable[[ServerConnection], None],
        turns: ReadingTurns,
        max_streams: int,
    ) -> None:
        self._make = make
        self._opened = opened
        self._closed = closed
        self._turns = turns
        self._max_streams = max_streams
        self._loop = asyncio.get_running_loop()
        self._http2 = Connection(Role.SERVER, CONFIGURATION)
        self._reader = InputReader(self._http2, self._handle)
        self._transport: Any = None
        self._sender: Any = None  # a ResponseSender, once there is a transport
        self.streams: dict[int, Stream] = {}
        self.was_heard = True  # bytes arrived since the server last cleared this
        self.is_greeted = False
        self._preface = b""  # its start, until it is complete
        self._is_retiring = False

    # --- for the loop ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._sender = ResponseSender(self._http2, transport, self.streams, self._on_other_event)
        self._opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._sender.is_closed = True
        self._reader.stop()
        for stream in list(self.streams.values()):
            del self.streams[stream.stream_id]
            stream.open = False
            stream.gone()
            stream.aborted()
        self._closed(self)

    def data_received(self, data: bytes) -> None:
        if self._sender.is_closed:
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
        self._sender.pause()
        if not self._sender.is_closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._sender.is_closed:
            self.was_heard = True  # the client is alive: it reads, if slowly
            self._sender.resume()
            self._resume_reading()

    # --- for the server ----------------------------------------------------------------------

    def ping(self) -> None:
        """Sends a ping, to see whether the client is alive."""
        self._http2.ping(b"keepaliv")
        self._sender.flush_soon()

    def retire(self) -> None:
        """Sends GOAWAY and finishes the requests in flight."""
        if not self.is_greeted:
            self.close()
        elif not self._is_retiring and not self._sender.is_closed:
            self._is_retiring = True
            self._http2.send_shutdown_notice()
            # The client acknowledges this ping after all requests that it sent before it got the
            # GOAWAY.
            self._http2.ping(RETIRING)
            self._sender.flush_soon()

    def close(self) -> None:
        """Closes the connection after the buffered bytes."""
        self._sender.flush()
        self._sender.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._sender.abort()

    # --- reading -----------------------------------------------------------------------------

    def _greet(self, data: bytes) -> bytes:
        """Checks the connection preface. Returns the bytes for the library, once it is complete."""
        data = self._preface + data
        if not data.startswith(PREFACE[: len(data)]):
            self._sender.close(HTTP1_ANSWER if data[:1].isalpha() else b"")
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
        self._sender.flush_soon()
        return data

    def _read(self, data: bytes) -> None:
        """Reads bytes until the turn's budget is used up."""
        was_scheduled = self._sender.hold()
        try:
            self._reader.read(data)
        except NGH2Error as error:
            self._fail(error)
            return
        self._sender.release(was_scheduled)
        if self._reader.is_paused and not self._sender.is_closed:
            self._transport.pause_reading()
            self._turns.add(self._continue_reading)

    def _continue_reading(self) -> None:
        """Reads on, in a later turn."""
        if not self._sender.is_closed:
            self._read(b"")
            self._resume_reading()

    def _resume_reading(self) -> None:
        sender = self._sender
        if not self._reader.is_paused and sender.is_writable and not sender.is_closed:
            self._transport.resume_reading()

    # --- events ------------------------------------------------------------------------------

    def _handle(self, events: list[Any]) -> None:
        """Handles events of bytes that were read."""
        streams = self.streams
        event: Any  # its kind decides which attributes it has
        for event in events:
            kind = type(event)
            if kind is DataReceived:
                stream = streams.get(event.stream_id)
                if stream is not None and stream.open:
                    stream.received(event.data, event.end_stream)
                else:
                    self._on_unread_data(event.stream_id, event.data, event.end_stream)
            elif kind is RequestReceived:
                self._on_request(event.stream_id, event.headers, event.end_stream)
            else:
                self._on_other_event(event)

    def _on_other_event(self, event: Any) -> None:
        kind = type(event)
        if kind is StreamClosed:
            self._on_stream_closed(event.stream_id)
        elif kind is TrailersReceived:
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                self._end_request(stream)
        elif kind is WindowUpdated:
            self._sender.flush_soon()
        elif kind is PingAcknowledged:
            if event.opaque_data == RETIRING and self._is_retiring:
                self._http2.send_goaway()
                self._sender.flush_soon()
        elif kind is ConnectionClosed:
            self._loop.call_soon(self.close)

    def _on_request(self, stream_id: int, headers: tuple[Header, ...], has_ended: bool) -> None:
        stream = self._make(self._sender, stream_id, headers)
        if isinstance(stream, tuple):
            self._sender.refuse(stream_id, stream, has_ended)
            return
        self.streams[stream_id] = stream
        if has_ended:
            self._end_request(stream)

    def _on_unread_data(self, stream_id: int, data: bytes, has_ended: bool) -> None:
        if data:  # not read, but the connection's window counts it
            self._sender.consume(stream_id, len(data))
        if has_ended:
            self._sender.request_ended(stream_id)
            stream = self.streams.get(stream_id)
            if stream is not None:
                stream.ended = True

    def _end_request(self, stream: Stream) -> None:
        stream.ended = True
        if stream.open:
            stream.request_ended()

    def _on_stream_closed(self, stream_id: int) -> None:
        """The stream is complete, or was reset by either side."""
        self._sender.forget(stream_id)
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            was_open, stream.open = stream.open, False
            stream.gone()
            if was_open:
                stream.aborted()
        if self._is_retiring and not self.streams:
            self._sender.flush_soon()

    def _fail(self, error: Exception) -> None:
        """Ends a connection whose client broke the protocol or exceeded a limit."""
        code = ErrorCode.PROTOCOL_ERROR
        if isinstance(error, DenialOfServiceError):
            code = ErrorCode.ENHANCE_YOUR_CALM
        payload = bytes(4) + code.to_bytes(4, "big") + str(error).encode()[:200]
        # The library has no session left that could write the frame.
        self._sender.close(len(payload).to_bytes(3, "big") + GOAWAY_HEAD + payload)
