"""The client's end of an HTTP/2 connection (RFC 9113), as far as gRPC's unary calls use it.

A stream is a request that is sent as a whole, as far as the windows of the other end allow, and a
response that is handed on as it comes. What breaks the protocol ends its stream or, where the rest
can't be understood any more, the connection.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from typing import Any, Protocol

from convserve_client.loadgen.headers import (
    MOST_HEADERS_BYTES,
    Head,
    Heads,
    Unreadable,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Frames
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE = range(9)
CONTINUATION = 9
END_STREAM, ACK, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
FRAME_HEAD = 9

# Error codes
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM, INADEQUATE_SECURITY = 11, 12

# Settings
TABLE_SIZE, ENABLE_PUSH, MOST_STREAMS, FIRST_WINDOW, FRAME_LIMIT, HEADERS_LIMIT = range(1, 7)
USUAL_TABLE = 4096
NO_TABLE = b"\x20"  # at the beginning of a header block

USUAL_WINDOW, USUAL_FRAME, MOST_WINDOW = 65_535, 16_384, (1 << 31) - 1
LAST_STREAM = MOST_WINDOW

# Ours. All that comes is read at once: windows are wide, and granted anew when half of one is used.
STREAM_WINDOW = 8 << 20
CONNECTION_WINDOW = 256 << 20

# Parts of what is to be written, of which a request has six: so many go out before the turn ends,
# for the server to have something to do meanwhile. (64 callers of LeNet-5, medians of six rounds in
# turn on two cores: 8,650 answers a second, with all at the end of the turn 7,550.)
WRITE_PARTS = 48

_head_of = struct.Struct(">BHBBI").unpack_from  # 24 bits of length, kind, flags, stream
_setting = struct.Struct(">HI")


class Fault(Exception):
    """The other end broke the protocol, and the connection ends."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Stream(ABC):
    """A request and its response. Methods are called on the loop's thread; none of them waits."""

    __slots__ = ("granted", "stream_id", "unsent", "widened")

    def __init__(self) -> None:
        self.stream_id = 0
        self.widened = 0  # bytes that may be sent beyond the connection's `first_window`
        self.granted = 0  # bytes of the response that are not granted anew yet
        self.unsent: memoryview | None = None  # waits for the other end's windows

    @abstractmethod
    def headers(self, head: Head) -> None:
        """The response has begun; more than once, where it is announced before."""

    @abstractmethod
    def received(self, data: bytes, start: int, end: int) -> None:
        """Bytes of the response's body: those of `data` between two places."""

    @abstractmethod
    def response_ended(self, trailers: Head) -> None:
        """All of the response has come. Trailers are empty where there are none, and all of the
        headers where nothing else came. The stream is over."""

    @abstractmethod
    def failed(self, code: int | None, why: str) -> None:
        """The stream is over, with one of HTTP/2's error codes; None: its connection is."""


class Owner(Protocol):
    """Who opens streams on a connection, and is told of it."""

    def has_room(self, connection: Connection) -> None:
        """A stream may be opened that might not have been before."""

    def leaving(self, connection: Connection) -> None:
        """No stream may be opened any more; those there are go on."""

    def closed(self, connection: Connection) -> None: ...


NO_TRAILERS = Head()


class Connection(asyncio.Protocol):
    """One connection. Everything happens on the event loop's thread.

    Await `ready` before anything is opened; it raises ConnectionError. `gone` is done when the
    connection has ended.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.streams: dict[int, Stream] = {}
        self.most_streams = MOST_WINDOW
        self.next_stream = 1
        self.left = False  # no stream may be opened any more
        self._transport: Any = None
        self._heads = Heads()
        self._rest = b""  # the beginning of a frame
        self._block: bytearray | None = None  # of headers that go on in further frames
        self._block_stream = 0
        self._block_ends = False
        self._granted = 0  # bytes that came and are not granted anew yet
        self._window = USUAL_WINDOW
        self._first_window = USUAL_WINDOW
        self._frame_limit = USUAL_FRAME
        self._blocked: dict[Stream, None] = {}  # in the order in which they are to send
        self._unblocking = False
        self._tableless = False  # the other end was told that its table stays empty
        self._lead = b""  # of the next header block
        self._out: list[bytes | memoryview] = []
        self._flushing = False  # what is written goes out without further ado
        self._why = "the connection was closed"

    # --- the loop's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(0)  # uvloop would wait for the end of the turn
        settings = (
            (ENABLE_PUSH, 0),
            (FIRST_WINDOW, STREAM_WINDOW),
            (HEADERS_LIMIT, MOST_HEADERS_BYTES),
        )
        self._write(PREFACE)
        self._write(_frame(SETTINGS, 0, 0, b"".join(_setting.pack(*one) for one in settings)))
        self._grant(0, CONNECTION_WINDOW - USUAL_WINDOW)

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._why = str(error) or type(error).__name__
        self._leave()
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(self._why))
            self.ready.exception()  # who gave up waiting is not to be told of it
        self._fail_all()
        self._owner.closed(self)
        self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._rest:
            data = self._rest + data
            self._rest = b""
        self._flushing = True  # one write for all that is answered to this
        try:
            at = self._frames(data)
            if at < len(data):
                self._rest = data[at:]
            if self._unblocking:
                self._unblock()
        except Fault as fault:
            self._why = f"the server broke HTTP/2: {fault}"
            self._end_with(fault.code, str(fault))
            return
        self._flush()
        if self.left and not self.streams:
            self.close()

    # --- sending -----------------------------------------------------------------------------

    def open(self, stream: Stream, block: bytes, body: bytes) -> None:
        """Sends a request: the block of its headers, and its body as soon as the windows allow.

        There must be fewer than `most_streams`, and the connection must not have `left`.
        """
        stream_id = stream.stream_id = self.next_stream
        self.next_stream = stream_id + 2
        stream.widened = stream.granted = 0
        self.streams[stream_id] = stream
        if self._lead:
            block, self._lead = self._lead + block, b""
        number = stream_id.to_bytes(4, "big")
        head = (len(block) << 16 | HEADERS << 8 | END_HEADERS).to_bytes(5, "big")
        if not self._flushing:
            self._flush_soon()
        size = len(body)
        if size <= self._window and size <= self._first_window and size <= self._frame_limit:
            self._window -= size
            stream.widened = -size
            # A frame of DATA, kind 0, which ends the stream.
            body_head = (size << 16 | END_STREAM).to_bytes(5, "big")
            self._out += (head, number, block, body_head, number, body)
        else:
            self._out += (head, number, block)
            stream.unsent = memoryview(body)
            self._blocked[stream] = None
            self._send_some(stream)
        if len(self._out) >= WRITE_PARTS:
            self._write_out()
        if self.next_stream > LAST_STREAM:
            self._leave()

    def reset(self, stream: Stream, code: int = CANCEL) -> None:
        """Ends a stream that is not over yet, which is not told of it."""
        del self.streams[stream.stream_id]
        self._blocked.pop(stream, None)
        stream.unsent = None
        self._write(_frame(RST_STREAM, 0, stream.stream_id, code.to_bytes(4, "big")))
        if not self.left:
            self._owner.has_room(self)
        elif not self.streams:
            self._loop.call_soon(self.close)

    def close(self) -> None:
        """Ends the connection once all that was written has gone out."""
        self._end_with(NO_ERROR, "")

    def abort(self) -> None:
        """Ends the connection now."""
        self._transport.abort()

    # --- receiving ---------------------------------------------------------------------------

    def _frames(self, data: bytes) -> int:
        """Takes in all whole frames; returns where the rest begins."""
        at, end = 0, len(data)
        while end - at >= FRAME_HEAD:
            high, low, kind, flags, stream_id = _head_of(data, at)
            size = high << 16 | low
            if size > USUAL_FRAME:
                raise Fault(FRAME_SIZE_ERROR, f"a frame of {size} bytes; {USUAL_FRAME} are allowed")
            start = at + FRAME_HEAD
            at = start + size
            if at > end:
                return start - FRAME_HEAD
            stream_id &= LAST_STREAM
            if self._block is not None and (kind, stream_id) != (CONTINUATION, self._block_stream):
                raise Fault(PROTOCOL_ERROR, "headers must go on before anything else comes")
            if kind == HEADERS:
                self._headers(flags, stream_id, data[start:at])
            elif kind == DATA:
                self._body(flags, stream_id, data, start, at)
            else:
                self._frame(kind, flags, stream_id, data[start:at])
        return at

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.ready.done() and kind != SETTINGS:
            raise Fault(PROTOCOL_ERROR, "settings must come first")
        if kind == WINDOW_UPDATE:
            self._widened(stream_id, payload)
        elif kind == RST_STREAM:
            self._was_reset(stream_id, payload)
        elif kind == PING:
            if stream_id or len(payload) != 8:
                raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "PING")
            if not flags & ACK:
                self._write(_frame(PING, ACK, 0, payload))
        elif kind == SETTINGS:
            self._settings(flags, stream_id, payload)
        elif kind == CONTINUATION:
            self._continuation(flags, payload)
        elif kind == GOAWAY:
            self._dismissed(stream_id, payload)
        elif kind == PUSH_PROMISE:
            raise Fault(PROTOCOL_ERROR, "a push, which was turned off")
        # PRIORITY is advice; all others are extensions, and passed over (RFC 9113, 5.5).

    def _body(self, flags: int, stream_id: int, data: bytes, start: int, end: int) -> None:
        size = end - start
        self._granted += size
        if self._granted >= CONNECTION_WINDOW // 2:
            self._grant(0, self._granted)
            self._granted = 0
        if flags & PADDED:
            start, end = _within_padding(data, start, end)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._must_have_been(stream_id, "DATA")
            return
        stream.received(data, start, end)
        if stream_id not in self.streams:
            return  # it was given up for what came
        if flags & END_STREAM:
            self._end(stream, NO_TRAILERS)
            return
        stream.granted += size
        if stream.granted >= STREAM_WINDOW // 2:
            self._grant(stream_id, stream.granted)
            stream.granted = 0

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & (PADDED | WITH_PRIORITY):
            start, end = 0, len(payload)
            if flags & PADDED:
                start, end = _within_padding(payload, start, end)
            if flags & WITH_PRIORITY:
                start += 5
                if start > end:
                    raise Fault(FRAME_SIZE_ERROR, "HEADERS without all of its priority")
            payload = payload[start:end]
        if flags & END_HEADERS:
            self._whole_block(stream_id, payload, flags & END_STREAM)
        else:
            self._block = bytearray(payload)
            self._block_stream, self._block_ends = stream_id, bool(flags & END_STREAM)

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Fault(PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block += payload
        if len(self._block) > MOST_HEADERS_BYTES:
            raise Fault(ENHANCE_YOUR_CALM, f"headers of more than {MOST_HEADERS_BYTES} bytes")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._whole_block(self._block_stream, block, self._block_ends)

    def _whole_block(self, stream_id: int, block: bytes, ends: int) -> None:
        try:
            head = self._heads.read(block)  # whatever it is for: the next one builds on it
        except Unreadable as error:
            raise Fault(COMPRESSION_ERROR, str(error)) from None
        stream = self.streams.get(stream_id)
        if stream is None:
            self._must_have_been(stream_id, "HEADERS")
        elif head.malformed:
            self.reset(stream, PROTOCOL_ERROR)
            stream.failed(PROTOCOL_ERROR, "its headers are malformed")
        elif ends:
            self._end(stream, head)
        else:
            stream.headers(head)

    def _end(self, stream: Stream, trailers: Head) -> None:
        del self.streams[stream.stream_id]
        if stream.unsent is not None:  # the server wants no more of it
            del self._blocked[stream]
            stream.unsent = None
            self._write(_frame(RST_STREAM, 0, stream.stream_id, CANCEL.to_bytes(4, "big")))
        stream.response_ended(trailers)
        if not self.left:
            self._owner.has_room(self)

    def _was_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            self._must_have_been(stream_id, "RST_STREAM")
            return
        self._blocked.pop(stream, None)
        stream.unsent = None
        code = int.from_bytes(payload, "big")
        stream.failed(code, f"the server ended the stream with code {code}")
        if not self.left:
            self._owner.has_room(self)

    def _dismissed(self, stream_id: int, payload: bytes) -> None:
        """The server takes no streams beyond one it names."""
        if stream_id or len(payload) < 8:
            raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "GOAWAY")
        last = int.from_bytes(payload[:4], "big") & LAST_STREAM
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

    def _widened(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        size = int.from_bytes(payload, "big") & MOST_WINDOW
        if not stream_id:
            self._window += size
            if not size or self._window > MOST_WINDOW:
                raise Fault(FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR, "WINDOW_UPDATE")
        else:
            stream = self.streams.get(stream_id)
            if stream is None:
                self._must_have_been(stream_id, "WINDOW_UPDATE")
                return
            stream.widened += size
            if not size or self._first_window + stream.widened > MOST_WINDOW:
                code = FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR
                self.reset(stream, code)
                stream.failed(code, "its window can't be widened so")
        self._unblocking = True

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Fault(PROTOCOL_ERROR, "settings of a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise Fault(FRAME_SIZE_ERROR, "SETTINGS")
        if flags & ACK:
            return
        for name, value in _setting.iter_unpack(payload):
            if name == MOST_STREAMS:
                self.most_streams = value
            elif name == FIRST_WINDOW:
                if value > MOST_WINDOW:
                    raise Fault(FLOW_CONTROL_ERROR, f"windows of {value} bytes")
                self._first_window = value
            elif name == FRAME_LIMIT:
                if not USUAL_FRAME <= value < 1 << 24:
                    raise Fault(PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_limit = value
            elif name == TABLE_SIZE and value < USUAL_TABLE and not self._tableless:
                # A block must say so that uses no table all the same (RFC 7541, 4.2); it holds
                # for whatever size comes later.
                self._tableless, self._lead = True, NO_TABLE
        self._write(_frame(SETTINGS, ACK, 0))
        self._unblocking = True
        if not self.ready.done():
            self.ready.set_result(None)
        elif not self.left:
            self._owner.has_room(self)

    def _must_have_been(self, stream_id: int, kind: str) -> None:
        """What comes for a stream that is over crossed our word of that; others there can't be."""
        if not stream_id & 1 or stream_id >= self.next_stream:
            raise Fault(PROTOCOL_ERROR, f"{kind} on stream {stream_id}, which never began")

    # --- ends --------------------------------------------------------------------------------

    def _leave(self) -> None:
        if not self.left:
            self.left = True
            self._owner.leaving(self)

    def _end_with(self, code: int, why: str) -> None:
        if self._transport.is_closing():
            return
        self._leave()
        payload = bytes(4) + code.to_bytes(4, "big") + why.encode()[:200]  # nothing was pushed
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

    # --- writing -----------------------------------------------------------------------------

    def _unblock(self) -> None:
        """Sends what the windows allow, the oldest request first."""
        self._unblocking = False
        for stream in list(self._blocked):
            if self._window <= 0:
                break
            self._send_some(stream)

    def _send_some(self, stream: Stream) -> None:
        unsent = stream.unsent
        assert unsent is not None
        while unsent:
            room = min(self._first_window + stream.widened, self._window, self._frame_limit)
            if room <= 0:
                stream.unsent = unsent
                return
            part, unsent = unsent[:room], unsent[room:]
            stream.widened -= len(part)
            self._window -= len(part)
            head = (len(part) << 16 | (0 if unsent else END_STREAM)).to_bytes(5, "big")
            self._write(head + stream.stream_id.to_bytes(4, "big"))
            self._write(part)
        stream.unsent = None
        del self._blocked[stream]

    def _grant(self, stream_id: int, size: int) -> None:
        self._write(_frame(WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big")))

    def _write(self, part: bytes | memoryview) -> None:
        """What is written in one turn of the loop goes out together, or in large parts."""
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
    return head.to_bytes(FRAME_HEAD, "big") + payload


def _within_padding(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Where a padded payload's own bytes begin and end."""
    if start == end or data[start] >= end - start:
        raise Fault(PROTOCOL_ERROR, "more padding than there is room for")
    return start + 1, end - data[start]
