"""Client side of an HTTP/2 connection (RFC 9113), as far as unary gRPC calls need it.

A stream is one request and one response. The request is sent as a whole, as far as the server's
windows allow; the response is passed on as it arrives. A violation of the protocol ends the stream,
or the connection if the rest cannot be understood.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from typing import Any, Protocol

from convserve_client.loadgen.wire.headers import (
    MAX_HEADERS_BYTES,
    HeaderDecoder,
    ResponseHead,
    UndecodableHeaders,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Frames
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
FRAME_HEAD_BYTES = 9

# Error codes
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM, INADEQUATE_SECURITY = 11, 12

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
EMPTY_TABLE = b"\x20"  # first byte of a header block: table size update to 0

DEFAULT_WINDOW, DEFAULT_FRAME_SIZE, MAX_WINDOW = 65_535, 16_384, (1 << 31) - 1
MAX_STREAM_ID = MAX_WINDOW

# Our windows. All data is read at once, so they are wide. A window is updated when half is used.
STREAM_WINDOW = 8 << 20
CONNECTION_WINDOW = 256 << 20

# After this many parts, output is written before the loop's turn ends, so that the server can start
# to work. A request has six parts. Measured with 64 callers of LeNet-5 on two cores (medians of six
# rounds): 8,650 answers per second, but 7,550 if all is written at the end of the turn.
WRITE_PARTS = 48

_head_of = struct.Struct(">BHBBI").unpack_from  # 24 bits of length, kind, flags, stream
_setting = struct.Struct(">HI")


class ProtocolError(Exception):
    """The server violated the protocol. The connection ends."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Stream(ABC):
    """A request and its response. Methods are called on the event loop and must not block."""

    __slots__ = ("ungranted", "stream_id", "unsent", "window_change")

    def __init__(self) -> None:
        self.stream_id = 0
        self.window_change = 0  # change of the send window since the stream began, in bytes
        self.ungranted = 0  # bytes received and not yet returned by a WINDOW_UPDATE
        self.unsent: memoryview | None = None  # rest of the request, blocked by the windows

    @abstractmethod
    def headers(self, head: ResponseHead) -> None:
        """Headers of the response. Called again for each informational response (status 1xx)."""

    @abstractmethod
    def received(self, data: bytes, start: int, end: int) -> None:
        """Part of the response's body: data[start:end]."""

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
        """Another stream can be opened now."""

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
        self.max_streams = MAX_WINDOW
        self.next_stream = 1
        self.is_leaving = False  # no more streams can be opened
        self._transport: Any = None
        self._decoder = HeaderDecoder()
        self._partial_frame = b""  # start of a frame whose rest has not arrived
        self._block: bytearray | None = None  # header block that continues in further frames
        self._block_stream = 0
        self._block_ends_stream = False
        self._ungranted = 0  # bytes received and not yet returned by a WINDOW_UPDATE
        self._window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._max_frame_size = DEFAULT_FRAME_SIZE
        self._blocked: dict[Stream, None] = {}  # streams with an unsent rest, oldest first
        self._windows_changed = False
        self._table_refused = False  # whether the server knows that its header table stays empty
        self._block_prefix = b""  # goes before the next header block
        self._out: list[bytes | memoryview] = []
        self._flushing = False  # whether a flush is already planned
        self._why = "the connection was closed"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(0)  # otherwise uvloop writes at the end of the turn
        settings = (
            (ENABLE_PUSH, 0),
            (INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (MAX_HEADER_LIST_SIZE, MAX_HEADERS_BYTES),
        )
        self._write(PREFACE)
        self._write(_frame(SETTINGS, 0, 0, b"".join(_setting.pack(*one) for one in settings)))
        self._grant(0, CONNECTION_WINDOW - DEFAULT_WINDOW)

    def connection_lost(self, error: Exception | None) -> None:
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
        if self._transport.is_closing():
            return
        if self._partial_frame:
            data = self._partial_frame + data
            self._partial_frame = b""
        self._flushing = True  # one write for all responses to this data
        try:
            at = self._read_frames(data)
            if at < len(data):
                self._partial_frame = data[at:]
            if self._windows_changed:
                self._send_blocked()
        except ProtocolError as error:
            self._why = f"the server violated HTTP/2: {error}"
            self._end_with(error.code, str(error))
            return
        self._flush()
        if self.is_leaving and not self.streams:
            self.close()

    def open(self, stream: Stream, block: bytes, body: bytes) -> None:
        """Sends a request: its header block, and its body as soon as the windows allow.

        There must be fewer than `max_streams`, and the connection must not be leaving.
        """
        stream_id = stream.stream_id = self.next_stream
        self.next_stream = stream_id + 2
        stream.window_change = stream.ungranted = 0
        self.streams[stream_id] = stream
        if self._block_prefix:
            block, self._block_prefix = self._block_prefix + block, b""
        number = stream_id.to_bytes(4, "big")
        head = (len(block) << 16 | HEADERS << 8 | END_HEADERS).to_bytes(5, "big")
        if not self._flushing:
            self._flush_soon()
        size = len(body)
        if size <= self._window and size <= self._initial_window and size <= self._max_frame_size:
            self._window -= size
            stream.window_change = -size
            # head of a DATA frame (type 0) that ends the stream
            body_head = (size << 16 | END_STREAM).to_bytes(5, "big")
            self._out += (head, number, block, body_head, number, body)
        else:
            self._out += (head, number, block)
            stream.unsent = memoryview(body)
            self._blocked[stream] = None
            self._send_some(stream)
        if len(self._out) >= WRITE_PARTS:
            self._write_out()
        if self.next_stream > MAX_STREAM_ID:
            self._leave()

    def reset(self, stream: Stream, code: int = CANCEL) -> None:
        """Closes an open stream without calling its `failed`."""
        del self.streams[stream.stream_id]
        self._blocked.pop(stream, None)
        stream.unsent = None
        self._write(_frame(RST_STREAM, 0, stream.stream_id, code.to_bytes(4, "big")))
        if not self.is_leaving:
            self._owner.on_room(self)
        elif not self.streams:
            self._loop.call_soon(self.close)

    def close(self) -> None:
        """Closes the connection after all output is written."""
        self._end_with(NO_ERROR, "")

    def abort(self) -> None:
        """Closes the connection at once."""
        self._transport.abort()

    def _read_frames(self, data: bytes) -> int:
        """Handles all complete frames. Returns where the incomplete rest begins."""
        at, end = 0, len(data)
        while end - at >= FRAME_HEAD_BYTES:
            high, low, kind, flags, stream_id = _head_of(data, at)
            size = high << 16 | low
            if size > DEFAULT_FRAME_SIZE:
                raise ProtocolError(
                    FRAME_SIZE_ERROR, f"a frame of {size} bytes; {DEFAULT_FRAME_SIZE} are allowed"
                )
            start = at + FRAME_HEAD_BYTES
            at = start + size
            if at > end:
                return start - FRAME_HEAD_BYTES
            stream_id &= MAX_STREAM_ID
            if self._block is not None and (kind, stream_id) != (CONTINUATION, self._block_stream):
                raise ProtocolError(PROTOCOL_ERROR, "another frame inside a header block")
            if kind == HEADERS:
                self._on_headers(flags, stream_id, data[start:at])
            elif kind == DATA:
                self._on_data(flags, stream_id, data, start, at)
            else:
                self._on_frame(kind, flags, stream_id, data[start:at])
        return at

    def _on_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.ready.done() and kind != SETTINGS:
            raise ProtocolError(PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if kind == WINDOW_UPDATE:
            self._on_window_update(stream_id, payload)
        elif kind == RST_STREAM:
            self._on_reset(stream_id, payload)
        elif kind == PING:
            if stream_id or len(payload) != 8:
                raise ProtocolError(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "PING")
            if not flags & ACK:
                self._write(_frame(PING, ACK, 0, payload))
        elif kind == SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind == GOAWAY:
            self._on_goaway(stream_id, payload)
        elif kind == PUSH_PROMISE:
            raise ProtocolError(PROTOCOL_ERROR, "PUSH_PROMISE although push is disabled")
        # PRIORITY is only advice. Unknown frames are extensions and are ignored (RFC 9113, 5.5).

    def _on_data(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        size = end - start
        self._ungranted += size
        if self._ungranted >= CONNECTION_WINDOW // 2:
            self._grant(0, self._ungranted)
            self._ungranted = 0
        if flags & PADDED:
            start, end = _within_padding(data, start, end)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_finished_stream(stream_id, "DATA")
            return
        stream.received(data, start, end)
        if stream_id not in self.streams:
            return  # the stream abandoned its call
        if flags & END_STREAM:
            self._end(stream, NO_TRAILERS)
            return
        stream.ungranted += size
        if stream.ungranted >= STREAM_WINDOW // 2:
            self._grant(stream_id, stream.ungranted)
            stream.ungranted = 0

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & (PADDED | WITH_PRIORITY):
            start, end = 0, len(payload)
            if flags & PADDED:
                start, end = _within_padding(payload, start, end)
            if flags & WITH_PRIORITY:
                start += 5
                if start > end:
                    raise ProtocolError(FRAME_SIZE_ERROR, "HEADERS with an incomplete priority")
            payload = payload[start:end]
        if flags & END_HEADERS:
            self._read_block(stream_id, payload, flags & END_STREAM)
        else:
            self._block = bytearray(payload)
            self._block_stream, self._block_ends_stream = stream_id, bool(flags & END_STREAM)

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ProtocolError(PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block += payload
        if len(self._block) > MAX_HEADERS_BYTES:
            raise ProtocolError(
                ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADERS_BYTES} bytes"
            )
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._read_block(self._block_stream, block, self._block_ends_stream)

    def _read_block(self, stream_id: int, block: bytes, ends: int) -> None:
        try:
            # Also for a closed stream, because later blocks depend on this one.
            head = self._decoder.read(block)
        except UndecodableHeaders as error:
            raise ProtocolError(COMPRESSION_ERROR, str(error)) from None
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_finished_stream(stream_id, "HEADERS")
        elif head.malformed:
            self.reset(stream, PROTOCOL_ERROR)
            stream.failed(PROTOCOL_ERROR, "the response headers are malformed")
        elif ends:
            self._end(stream, head)
        else:
            stream.headers(head)

    def _end(self, stream: Stream, trailers: ResponseHead) -> None:
        del self.streams[stream.stream_id]
        if stream.unsent is not None:  # the server answered before it read the whole request
            del self._blocked[stream]
            stream.unsent = None
            self._write(_frame(RST_STREAM, 0, stream.stream_id, CANCEL.to_bytes(4, "big")))
        stream.response_ended(trailers)
        if not self.is_leaving:
            self._owner.on_room(self)

    def _on_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            self._check_finished_stream(stream_id, "RST_STREAM")
            return
        self._blocked.pop(stream, None)
        stream.unsent = None
        code = int.from_bytes(payload, "big")
        stream.failed(code, f"the server ended the stream with code {code}")
        if not self.is_leaving:
            self._owner.on_room(self)

    def _on_goaway(self, stream_id: int, payload: bytes) -> None:
        """The server accepts no streams above the ID that it names."""
        if stream_id or len(payload) < 8:
            raise ProtocolError(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "GOAWAY")
        last = int.from_bytes(payload[:4], "big") & MAX_STREAM_ID
        code = int.from_bytes(payload[4:8], "big")
        if code != NO_ERROR:
            text = payload[8:].decode("utf-8", "replace")
            self._why = f"the server ended the connection with code {code}: {text}"
        self._leave()
        for number in [number for number in self.streams if number > last]:
            stream = self.streams.pop(number)
            self._blocked.pop(stream, None)
            stream.unsent = None
            stream.failed(None, "the server takes no more calls on this connection")

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        size = int.from_bytes(payload, "big") & MAX_WINDOW
        if not stream_id:
            self._window += size
            if not size or self._window > MAX_WINDOW:
                raise ProtocolError(FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR, "WINDOW_UPDATE")
        else:
            stream = self.streams.get(stream_id)
            if stream is None:
                self._check_finished_stream(stream_id, "WINDOW_UPDATE")
                return
            stream.window_change += size
            if not size or self._initial_window + stream.window_change > MAX_WINDOW:
                code = FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR
                self.reset(stream, code)
                stream.failed(code, "WINDOW_UPDATE of 0 or beyond the maximum window")
        self._windows_changed = True

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ProtocolError(PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise ProtocolError(FRAME_SIZE_ERROR, "SETTINGS")
        if flags & ACK:
            return
        for name, value in _setting.iter_unpack(payload):
            if name == MAX_CONCURRENT_STREAMS:
                self.max_streams = value
            elif name == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ProtocolError(FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_SIZE <= value < 1 << 24:
                    raise ProtocolError(PROTOCOL_ERROR, f"a maximum frame size of {value} bytes")
                self._max_frame_size = value
            elif (
                name == HEADER_TABLE_SIZE and value < DEFAULT_TABLE_SIZE and not self._table_refused
            ):
                # Our blocks use no table, but the next one must acknowledge the smaller size
                # (RFC 7541, 4.2). Size 0 is below any later limit, so once is enough.
                self._table_refused, self._block_prefix = True, EMPTY_TABLE
        self._write(_frame(SETTINGS, ACK, 0))
        self._windows_changed = True
        if not self.ready.done():
            self.ready.set_result(None)
        elif not self.is_leaving:
            self._owner.on_room(self)

    def _check_finished_stream(self, stream_id: int, kind: str) -> None:
        """Raises ProtocolError unless the stream existed. Late frames are allowed."""
        if not stream_id & 1 or stream_id >= self.next_stream:
            raise ProtocolError(
                PROTOCOL_ERROR, f"{kind} on stream {stream_id}, which was never opened"
            )

    def _leave(self) -> None:
        if not self.is_leaving:
            self.is_leaving = True
            self._owner.on_leaving(self)

    def _end_with(self, code: int, why: str) -> None:
        if self._transport.is_closing():
            return
        self._leave()
        last_stream = bytes(4)  # 0: the server has opened no streams
        payload = last_stream + code.to_bytes(4, "big") + why.encode()[:200]
        self._write(_frame(GOAWAY, 0, 0, payload))
        self._flush()
        self._transport.close()
        self._fail_all()

    def _fail_all(self) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        for stream in streams:
            stream.unsent = None
            stream.failed(None, self._why)

    def _send_blocked(self) -> None:
        """Sends what the windows allow, oldest request first."""
        self._windows_changed = False
        for stream in list(self._blocked):
            if self._window <= 0:
                break
            self._send_some(stream)

    def _send_some(self, stream: Stream) -> None:
        unsent = stream.unsent
        assert unsent is not None
        while unsent:
            room = min(
                self._initial_window + stream.window_change, self._window, self._max_frame_size
            )
            if room <= 0:
                stream.unsent = unsent
                return
            part, unsent = unsent[:room], unsent[room:]
            stream.window_change -= len(part)
            self._window -= len(part)
            head = (len(part) << 16 | (0 if unsent else END_STREAM)).to_bytes(5, "big")
            self._write(head + stream.stream_id.to_bytes(4, "big"))
            self._write(part)
        stream.unsent = None
        del self._blocked[stream]

    def _grant(self, stream_id: int, size: int) -> None:
        self._write(_frame(WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big")))

    def _write(self, part: bytes | memoryview) -> None:
        """Queues output, which is written at the end of the loop's turn or in large parts."""
        if not self._flushing:
            self._flush_soon()
        self._out.append(part)

    def _flush_soon(self) -> None:
        self._flushing = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._write_out()

    def _write_out(self) -> None:
        out, self._out = self._out, []
        if out and not self._transport.is_closing():
            self._transport.write(b"".join(out))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    head = len(payload) << 48 | kind << 40 | flags << 32 | stream_id
    return head.to_bytes(FRAME_HEAD_BYTES, "big") + payload


def _within_padding(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Start and end of a payload without its padding."""
    if start == end or data[start] >= end - start:
        raise ProtocolError(PROTOCOL_ERROR, "more padding than payload")
    return start + 1, end - data[start]
