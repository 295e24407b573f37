"""The server's end of an HTTP/2 connection (RFC 9113), as far as gRPC needs it.

It reads frames, passes them to their streams, and sends what the client's windows allow. It does
not push and ignores priorities. A protocol error ends its stream. If the rest of the connection can
no longer be understood or bounded, it ends the connection, with an error code and a reason.

Bounds: size of header blocks, number of streams, unread bytes per stream. While a client does not
read its responses, the server reads nothing more from it.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from server.transport.metadata import (
    MAX_HEADER_BLOCK_BYTES,
    MAX_HEADERS_BYTES,
    HeaderError,
    HeaderReader,
    RequestHead,
)

RETIRING = b"retiring"  # payload of the ping that follows the GOAWAY
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP1_ANSWER = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\n"
    b"content-type: text/plain\r\nconnection: close\r\n\r\n"
    b"This port speaks gRPC, over HTTP/2. REST, /metrics and /readyz are at the HTTP port.\n"
)

# Frames
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
FRAME_HEAD = 9

# Error codes
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM = 11

# Settings
(
    HEADER_TABLE_SIZE,
    ENABLE_PUSH,
    MAX_CONCURRENT_STREAMS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
) = range(1, 7)
DEFAULT_TABLE_SIZE = 4096
NO_TABLE = b"\x20"  # dynamic table size update to 0, at the start of a header block

DEFAULT_WINDOW, DEFAULT_FRAME_SIZE, MAX_WINDOW = 65_535, 16_384, (1 << 31) - 1

# Our settings. A stream's window bounds its unread bytes; a usual image fits without an update.
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
FRAME_BYTES = 256 << 10
# Read bytes are granted again in steps of at least this size, because each grant is a frame.
GRANT_BYTES = 256 << 10  # per stream
CONNECTION_GRANT_BYTES = 4 << 20  # per connection

LAST_STREAM = MAX_WINDOW

# Makes the stream of a request, or returns a header block that is the whole response.
MakeStream = Callable[["ServerConnection", int, RequestHead], "Stream | bytes"]

_window = struct.Struct(">I").unpack_from
_setting = struct.Struct(">HI")


class ProtocolError(Exception):
    """The client broke the protocol; the connection ends."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Stream(ABC):
    """A request and its response. Methods run on the loop's thread and do not block."""

    __slots__ = (
        "connection",
        "ended",
        "granted",
        "open",
        "stream_id",
        "trailers",
        "unsent",
        "sent_credit",
    )

    def __init__(self, connection: ServerConnection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.sent_credit = 0  # added to `first_window`: bytes the client lets us send
        self.granted = STREAM_WINDOW  # bytes that the client may still send
        self.unsent = memoryview(b"")  # waits for the client's windows
        self.trailers: bytes | None = None  # header block to send after `unsent`
        self.ended = False  # the client has sent the whole request
        self.open = True  # something is still to be sent or received

    @abstractmethod
    def received(self, data: bytes, start: int, end: int) -> None:
        """Handles the bytes data[start:end] of the request's body."""

    @abstractmethod
    def request_ended(self) -> None:
        """Handles the end of the request."""

    @abstractmethod
    def aborted(self) -> None:
        """Handles a reset or a lost connection: nothing can be sent any more."""

    @abstractmethod
    def gone(self) -> None:
        """Releases what the stream holds. Called once, however it ended."""

    def sent(self) -> None:  # noqa: B027  optional
        """Called when `unsent` has become empty."""


class ServerConnection(asyncio.Protocol):
    """One connection. Used on the event loop's thread only.

    `make` makes the stream of each request. `opened` and `closed` are called with the connection.
    """

    def __init__(
        self,
        make: MakeStream,
        opened: Callable[[ServerConnection], None],
        closed: Callable[[ServerConnection], None],
        max_streams: int,
    ) -> None:
        self._make = make
        self._opened = opened
        self._closed = closed
        self._max_streams = max_streams
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._header_reader = HeaderReader()
        self.streams: dict[int, Stream] = {}
        self.was_heard = True  # bytes arrived since the server last cleared this
        self.is_greeted = False
        self._settled = False  # the client's first SETTINGS have arrived
        self._incomplete = b""  # start of a frame whose rest has not arrived
        self._missing = 0  # bytes still to come of a DATA frame whose start was passed on
        self._missing_stream: Stream | None = None
        self._missing_ends = False
        self._block: bytearray | None = None  # header block that is not complete
        self._block_stream = 0
        self._block_ends = False
        self._last = 0  # highest stream id
        self._read_bytes = 0  # bytes read and not granted again yet
        self._window = DEFAULT_WINDOW
        self.first_window = DEFAULT_WINDOW
        self._frame_limit = DEFAULT_FRAME_SIZE
        self._blocked: dict[Stream, None] = {}  # streams with unsent data, in sending order
        self._is_send_scheduled = False
        self._table_is_off = False  # we told the client that our encoder uses no table
        self._table_update = b""  # to be sent at the start of the next header block
        self._out: list[bytes] = []
        self._unread_streams: set[int] = set()  # answered before their request ended
        self._is_retiring = False
        self._is_refusing = False  # new streams are ignored: the last GOAWAY named the last one
        self._is_closed = False

    # --- the loop's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closed = True
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        self._out.clear()
        for stream in streams:
            stream.open = False
            stream.gone()
            stream.aborted()
        self._closed(self)

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        self.was_heard = True
        if self._incomplete:
            data = self._incomplete + data
            self._incomplete = b""
        try:
            at = self._read_frames(data, 0 if self.is_greeted else self._preface(data))
        except ProtocolError as fault:
            self._fail(fault)
            return
        for stream_id in self._unread_streams:
            self._reset(stream_id, NO_ERROR)  # the rest is not read
        self._unread_streams.clear()
        if at < len(data) and not self._is_closed:
            self._incomplete = data[at:]

    def eof_received(self) -> bool:
        return False  # a half-closed connection is closed

    def pause_writing(self) -> None:
        """Stops reading while the client does not read its responses."""
        if not self._is_closed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._is_closed:
            self.was_heard = True  # the client is alive: it reads, if slowly
            self._transport.resume_reading()

    # --- sending -----------------------------------------------------------------------------

    def answer(self, stream: Stream, head: bytes, body: bytes, trailers: bytes) -> None:
        """Sends a whole response: header block, body, trailer block."""
        size = len(body)
        room = min(self.first_window + stream.sent_credit, self._window, self._frame_limit)
        if size > room:
            self.begin(stream, head)
            self.send(stream, body, trailers)
            return
        stream.sent_credit -= size
        self._window -= size
        head = self._with_table_update(head)
        stream_id = stream.stream_id
        self._write(
            _frame(HEADERS, END_HEADERS, stream_id, head)
            + _frame(DATA, 0, stream_id, body)
            + _frame(HEADERS, END_HEADERS | END_STREAM, stream_id, trailers)
        )
        self._finish(stream)
        if not self.streams:
            self._flush()  # no other response could share the write

    def begin(self, stream: Stream, head: bytes, *, end: bool = False) -> None:
        """Sends the headers of a response; with `end` they are all of it."""
        self._headers_out(stream, head, end)
        if end:
            self._finish(stream)

    def send(self, stream: Stream, data: bytes, trailers: bytes | None = None) -> None:
        """Sends a part of a response's body, then its trailers. Calls `stream.sent` when done."""
        stream.unsent = memoryview(bytes(stream.unsent) + data if stream.unsent else data)
        stream.trailers = trailers
        self._blocked[stream] = None
        self._send_blocked()

    def reset(self, stream: Stream, code: int) -> None:
        """Ends a stream with an HTTP/2 error code."""
        self._drop(stream)
        self._reset(stream.stream_id, code)

    def grant(self, stream: Stream, size: int) -> None:
        """Lets the client send `size` more bytes of a request."""
        if stream.open and not stream.ended:
            stream.granted += size
            self._grant(stream.stream_id, size)

    def ping(self) -> None:
        """Sends a ping, to see whether the client is alive."""
        self._write(_frame(PING, 0, 0, b"keepaliv"))

    def retire(self) -> None:
        """Sends GOAWAY and finishes the requests in flight."""
        if not self.is_greeted:
            self.close()
        elif not self._is_retiring:
            self._is_retiring = True
            self._write(_goaway(LAST_STREAM, NO_ERROR))
            # The client acknowledges this ping after all requests that it sent before it got the
            # GOAWAY.
            self._write(_frame(PING, 0, 0, RETIRING))

    def close(self) -> None:
        """Closes the connection after the buffered bytes."""
        if not self._is_closed:
            self._flush()
            self._is_closed = True
            self._transport.close()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._is_closed = True
        self._transport.abort()

    # --- receiving ---------------------------------------------------------------------------

    def _preface(self, data: bytes) -> int:
        if not data.startswith(PREFACE[: len(data)]):
            if data[:1].isalpha():
                self._write(HTTP1_ANSWER)
            self.close()
            return len(data)
        if len(data) < len(PREFACE):
            return 0
        self.is_greeted = True
        self._greet()
        return len(PREFACE)

    def _greet(self) -> None:
        settings = (
            (MAX_CONCURRENT_STREAMS, self._max_streams),
            (INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (MAX_FRAME_SIZE, FRAME_BYTES),
            (MAX_HEADER_LIST_SIZE, MAX_HEADERS_BYTES),
        )
        self._write(_frame(SETTINGS, 0, 0, b"".join(_setting.pack(*one) for one in settings)))
        self._grant(0, CONNECTION_WINDOW - DEFAULT_WINDOW)

    def _read_frames(self, data: bytes, at: int) -> int:
        """Reads complete frames, and DATA as far as it has come. Returns where the rest starts."""
        if not self.is_greeted:
            return at
        end = len(data)
        if self._missing:
            at = self._continue_data(data, end)
        while end - at >= FRAME_HEAD and not self._is_closed:
            size = int.from_bytes(data[at : at + 3], "big")
            kind, flags = data[at + 3], data[at + 4]
            stream_id = int.from_bytes(data[at + 5 : at + 9], "big") & LAST_STREAM
            if size > FRAME_BYTES:
                raise ProtocolError(
                    FRAME_SIZE_ERROR, f"a frame of {size} bytes; {FRAME_BYTES} are allowed"
                )
            start = at + FRAME_HEAD
            after = start + size
            if self._block is not None and (kind, stream_id) != (CONTINUATION, self._block_stream):
                raise ProtocolError(PROTOCOL_ERROR, "headers must go on before anything else comes")
            if not self._settled:
                if kind != SETTINGS or flags & ACK:
                    raise ProtocolError(PROTOCOL_ERROR, "settings must come first")
                self._settled = after <= end
            if kind == DATA and not flags & PADDED:
                stream = self._body(stream_id, size)
                if after > end:
                    self._missing, self._missing_stream = after - end, stream
                    self._missing_ends = bool(flags & END_STREAM)
                    after = end
                if stream is not None:
                    stream.received(data, start, after)
                    if flags & END_STREAM and not self._missing:
                        self._end(stream)
                elif flags & END_STREAM and not self._missing:
                    self._unread_streams.discard(stream_id)
            elif after > end:
                break
            else:
                self._frame(kind, flags, stream_id, data[start:after])
            at = after
        return at

    def _continue_data(self, data: bytes, end: int) -> int:
        """Reads more of a DATA frame whose start was passed on."""
        take = min(self._missing, end)
        self._missing -= take
        stream = self._missing_stream
        if stream is not None and stream.open:
            stream.received(data, 0, take)
            if not self._missing and self._missing_ends:
                self._end(stream)
        if not self._missing:
            self._missing_stream = None
        return take

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == HEADERS:
            self._on_headers(flags, stream_id, payload)
        elif kind == WINDOW_UPDATE:
            self._on_window_update(stream_id, payload)
        elif kind == RST_STREAM:
            self._on_rst_stream(stream_id, payload)
        elif kind == PING:
            self._on_ping(flags, stream_id, payload)
        elif kind == SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == DATA:
            self._on_padded_data(flags, stream_id, payload)
        elif kind == CONTINUATION:
            self._on_continuation(flags, stream_id, payload)
        elif kind == PRIORITY:
            if len(payload) != 5 or not stream_id:
                raise ProtocolError(FRAME_SIZE_ERROR if stream_id else PROTOCOL_ERROR, "PRIORITY")
        elif kind == GOAWAY:
            if stream_id or len(payload) < 8:
                raise ProtocolError(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "GOAWAY")
        elif kind == PUSH_PROMISE:
            raise ProtocolError(PROTOCOL_ERROR, "only servers push")
        # Other types are extensions and ignored (RFC 9113, 5.5).

    def _body(self, stream_id: int, size: int) -> Stream | None:
        """Counts `size` bytes of DATA against the windows. Returns the stream if it is open."""
        self._read_bytes += size
        if self._read_bytes >= CONNECTION_GRANT_BYTES:
            self._grant(0, self._read_bytes)
            self._read_bytes = 0
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_was_open(stream_id, "DATA")
            return None
        if stream.ended:
            self._stream_error(stream, STREAM_CLOSED)
            return None
        if size > stream.granted:
            self._stream_error(stream, FLOW_CONTROL_ERROR)
            return None
        stream.granted -= size
        return stream

    def _on_padded_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._body(stream_id, len(payload))
        start, end = _within_padding(flags, payload)
        if stream is not None:
            self.grant(
                stream, len(payload) - (end - start)
            )  # the padding counts against the window
            stream.received(payload, start, end)
            if flags & END_STREAM:
                self._end(stream)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise ProtocolError(PROTOCOL_ERROR, f"a request on stream {stream_id}")
        start, end = _within_padding(flags, payload)
        if flags & WITH_PRIORITY:
            start += 5
            if start > end:
                raise ProtocolError(FRAME_SIZE_ERROR, "HEADERS without all of its priority")
        if end - start > MAX_HEADER_BLOCK_BYTES:
            raise ProtocolError(
                ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BLOCK_BYTES} bytes"
            )
        if flags & END_HEADERS:
            block = payload[start:end] if flags & (PADDED | WITH_PRIORITY) else payload
            self._on_header_block(stream_id, block, bool(flags & END_STREAM))
        else:
            self._block = bytearray(payload[start:end])
            self._block_stream, self._block_ends = stream_id, bool(flags & END_STREAM)

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None:
            raise ProtocolError(PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload and not flags & END_HEADERS:
            raise ProtocolError(ENHANCE_YOUR_CALM, "CONTINUATION with nothing in it")
        self._block += payload
        if len(self._block) > MAX_HEADER_BLOCK_BYTES:
            raise ProtocolError(
                ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BLOCK_BYTES} bytes"
            )
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._on_header_block(stream_id, block, self._block_ends)

    def _on_header_block(self, stream_id: int, block: bytes, ends: bool) -> None:
        try:
            head = self._header_reader.read(
                block
            )  # even if the stream is ignored: HPACK state must stay in step
        except HeaderError as error:
            raise ProtocolError(COMPRESSION_ERROR, str(error)) from None
        stream = self.streams.get(stream_id)
        if stream is not None:
            if not ends:
                self._stream_error(stream, PROTOCOL_ERROR)  # trailers must end the request
            elif stream.ended:
                self._stream_error(stream, STREAM_CLOSED)
            else:
                self._end(stream)
        elif stream_id > self._last:
            if self._is_refusing:
                return
            self._last = stream_id
            if head.malformed:
                self._reset(stream_id, PROTOCOL_ERROR)
            elif len(self.streams) >= self._max_streams:
                self._reset(stream_id, REFUSED_STREAM)
            else:
                self._begin(stream_id, head, ends)

    def _begin(self, stream_id: int, head: RequestHead, ends: bool) -> None:
        stream = self._make(self, stream_id, head)
        if isinstance(stream, bytes):
            self._write(
                _frame(
                    HEADERS, END_HEADERS | END_STREAM, stream_id, self._with_table_update(stream)
                )
            )
            if not ends:
                self._unread_streams.add(stream_id)
        elif stream.open:  # its constructor may have refused it
            self.streams[stream_id] = stream
            if ends:
                self._end(stream)

    def _end(self, stream: Stream) -> None:
        if stream.open:
            stream.ended = True
            stream.request_ended()

    def _on_rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_was_open(stream_id, "RST_STREAM")
        else:
            self._drop(stream)
            stream.aborted()

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        size = _window(payload)[0] & MAX_WINDOW
        if not stream_id:
            self._window += size
            if not size or self._window > MAX_WINDOW:
                raise ProtocolError(FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR, "WINDOW_UPDATE")
        else:
            stream = self.streams.get(stream_id)
            if stream is None:
                self._check_was_open(stream_id, "WINDOW_UPDATE")
                return
            stream.sent_credit += size
            if not size or self.first_window + stream.sent_credit > MAX_WINDOW:
                self._stream_error(stream, FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR)
        self._send_blocked_soon()

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) != 8:
            raise ProtocolError(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "PING")
        if not flags & ACK:
            self._write(_frame(PING, ACK, 0, payload))
        elif payload == RETIRING and self._is_retiring and not self._is_refusing:
            self._is_refusing = True
            self._write(_goaway(self._last, NO_ERROR))
            self._leave()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(PROTOCOL_ERROR, "settings of a stream")
        if flags & ACK:
            if payload:
                raise ProtocolError(FRAME_SIZE_ERROR, "SETTINGS")
            return
        if len(payload) % 6:
            raise ProtocolError(FRAME_SIZE_ERROR, "SETTINGS")
        for name, value in _setting.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ProtocolError(FLOW_CONTROL_ERROR, f"windows of {value} bytes")
                self.first_window = value
            elif name == HEADER_TABLE_SIZE:
                if value < DEFAULT_TABLE_SIZE and not self._table_is_off:
                    # Our blocks use no table, but must still announce the smaller size (RFC 7541,
                    # 4.2). Size 0 holds for whatever size comes later.
                    self._table_is_off, self._table_update = True, NO_TABLE
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_SIZE <= value < 1 << 24:
                    raise ProtocolError(PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_limit = value
            elif name == ENABLE_PUSH and value > 1:
                raise ProtocolError(PROTOCOL_ERROR, f"push {value}")
        self._write(_frame(SETTINGS, ACK, 0))
        self._send_blocked_soon()

    def _check_was_open(self, stream_id: int, kind: str) -> None:
        """Raises ProtocolError for a stream that was never opened; one that ended is fine."""
        if stream_id > self._last and self._is_refusing and stream_id & 1:
            return
        if stream_id > self._last or not stream_id & 1:
            raise ProtocolError(PROTOCOL_ERROR, f"{kind} on stream {stream_id}, which never began")

    # --- ends --------------------------------------------------------------------------------

    def _stream_error(self, stream: Stream, code: int) -> None:
        """Ends a stream on which the client broke the protocol."""
        self.reset(stream, code)
        stream.aborted()

    def _finish(self, stream: Stream) -> None:
        """Ends a stream whose response is complete; resets it if the request still arrives."""
        if not stream.ended:
            self._reset(stream.stream_id, NO_ERROR)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        stream.open = False
        self.streams.pop(stream.stream_id, None)
        self._blocked.pop(stream, None)
        stream.gone()
        if self._is_refusing:
            self._leave()

    def _leave(self) -> None:
        if not self.streams:
            self._loop.call_soon(self.close)

    def _fail(self, fault: ProtocolError) -> None:
        self._write(_goaway(self._last, fault.code, str(fault)[:200]))
        self.close()

    # --- writing -----------------------------------------------------------------------------

    def _send_blocked_soon(self) -> None:
        """Schedules `_send_blocked` once per loop turn, however many frames widen the windows."""
        if self._blocked and not self._is_send_scheduled:
            self._is_send_scheduled = True
            self._loop.call_soon(self._send_blocked)

    def _send_blocked(self) -> None:
        """Sends what the windows allow, one frame per stream in turn."""
        self._is_send_scheduled = False
        while able := [
            stream for stream in self._blocked if self._room(stream) or not stream.unsent
        ]:
            for stream in able:
                self._send_some(stream)

    def _room(self, stream: Stream) -> int:
        """Bytes of a stream that may be sent now."""
        return max(0, min(self.first_window + stream.sent_credit, self._window, self._frame_limit))

    def _send_some(self, stream: Stream) -> None:
        size = min(len(stream.unsent), self._room(stream))
        if size:
            self._write(_frame(DATA, 0, stream.stream_id, bytes(stream.unsent[:size])))
            stream.unsent = stream.unsent[size:]
            stream.sent_credit -= size
            self._window -= size
        if stream.unsent:
            return
        del self._blocked[stream]
        if stream.trailers is None:
            stream.sent()
        else:
            self._headers_out(stream, stream.trailers, True)
            self._finish(stream)

    def _headers_out(self, stream: Stream, block: bytes, end: bool) -> None:
        block = self._with_table_update(block)
        flags, rest = END_STREAM if end else 0, b""
        if len(block) > DEFAULT_FRAME_SIZE:
            block, rest = block[:DEFAULT_FRAME_SIZE], block[DEFAULT_FRAME_SIZE:]
        self._write(_frame(HEADERS, flags | (0 if rest else END_HEADERS), stream.stream_id, block))
        while rest:
            block, rest = rest[:DEFAULT_FRAME_SIZE], rest[DEFAULT_FRAME_SIZE:]
            self._write(_frame(CONTINUATION, 0 if rest else END_HEADERS, stream.stream_id, block))

    def _with_table_update(self, block: bytes) -> bytes:
        """The header block, after a table size update if one is due."""
        lead, self._table_update = self._table_update, b""
        return lead + block

    def _reset(self, stream_id: int, code: int) -> None:
        self._write(_frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))

    def _grant(self, stream_id: int, size: int) -> None:
        self._write(_frame(WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big")))

    def _write(self, data: bytes) -> None:
        """Buffers bytes; all that is written in one loop turn is sent together."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and not self._is_closed:
            out, self._out = self._out, []
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    head = len(payload) << 48 | kind << 40 | flags << 32 | stream_id
    return head.to_bytes(FRAME_HEAD, "big") + payload


def _goaway(last: int, code: int, why: str = "") -> bytes:
    payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + why.encode()
    return _frame(GOAWAY, 0, 0, payload)


def _within_padding(flags: int, payload: bytes) -> tuple[int, int]:
    """Start and end of a payload without its padding."""
    if not flags & PADDED:
        return 0, len(payload)
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(PROTOCOL_ERROR, "more padding than there is room for")
    return 1, len(payload) - payload[0]
