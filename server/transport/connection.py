"""The server's end of an HTTP/2 connection (RFC 9113), as far as gRPC uses it.

Frames come in and are handed to their streams; what streams send goes out as far as the windows of
the other end allow. Nothing is pushed, and priorities are passed over. What breaks the protocol
ends its stream or, where the rest can't be understood or bounded any more, the connection, with the
code and a word that say why.

Bounded: header blocks, streams, the bytes of a stream that nobody has read, and what is to be sent
to an end that does not take it: nothing more is read from it meanwhile.
"""

from __future__ import annotations

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from server.transport.metadata import (
    HEADERS_BYTES,
    MOST_HEADERS_BYTES,
    Head,
    Heads,
    Unreadable,
)

RETIRING = b"retiring"  # of a ping
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
TABLE_SIZE, ENABLE_PUSH, MOST_STREAMS, FIRST_WINDOW, FRAME_LIMIT, HEADERS_LIMIT = range(1, 7)
USUAL_TABLE = 4096
NO_TABLE = b"\x20"  # at the beginning of a header block

USUAL_WINDOW, USUAL_FRAME, MOST_WINDOW = 65_535, 16_384, (1 << 31) - 1

# Ours. A stream's window holds what nobody has read; a usual image comes without waiting for more.
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
FRAME_BYTES = 256 << 10
# What was read is granted anew in pieces of this size at least: each is a message of its own.
GRANT_BYTES = 256 << 10  # of a stream
GRANT_ALL_BYTES = 4 << 20  # of the connection

LAST_STREAM = MOST_WINDOW

# What answers a request, or the block of headers that answers it, which is all of the response.
Make = Callable[["Connection", int, Head], "Stream | bytes"]

_window = struct.Struct(">I").unpack_from
_setting = struct.Struct(">HI")


class Fault(Exception):
    """The other end broke the protocol, and the connection ends."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Stream(ABC):
    """A request and its response. Methods are called on the loop's thread; none of them waits."""

    __slots__ = (
        "connection",
        "ended",
        "granted",
        "open",
        "stream_id",
        "trailers",
        "unsent",
        "widened",
    )

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.widened = 0  # bytes that it may send beyond the connection's `first_window`
        self.granted = STREAM_WINDOW  # bytes that the other end may send
        self.unsent = memoryview(b"")  # waits for the other end's windows
        self.trailers: bytes | None = None  # a block to be sent behind that
        self.ended = False  # the other end has sent all of its own
        self.open = True  # there is something to be sent or received still

    @abstractmethod
    def received(self, data: bytes, start: int, end: int) -> None:
        """Bytes of the request's body: those of `data` between two places."""

    @abstractmethod
    def request_ended(self) -> None:
        """All of the request has come."""

    @abstractmethod
    def aborted(self) -> None:
        """The other end has given up, or is gone. Nothing can be sent any more."""

    @abstractmethod
    def gone(self) -> None:
        """It is over, for whatever reason; called once."""

    def sent(self) -> None:  # noqa: B027  most have nothing to wait for
        """All that waited to be sent has been, as far as the stream is concerned."""


class Connection(asyncio.Protocol):
    """One connection. Everything happens on the event loop's thread.

    `make` makes what answers a request. `opened` and `closed` are told of the connection.
    """

    def __init__(
        self,
        make: Make,
        opened: Callable[[Connection], None],
        closed: Callable[[Connection], None],
        most_streams: int,
    ) -> None:
        self._make = make
        self._opened = opened
        self._closed = closed
        self._most_streams = most_streams
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._heads = Heads()
        self.streams: dict[int, Stream] = {}
        self.heard = True  # something came since somebody last set it to false
        self.greeted = False
        self._settled = False  # the other end's first settings have come
        self._rest = b""  # the beginning of a frame
        self._missing = 0  # bytes of a DATA frame, whose beginning has been handed on
        self._missing_stream: Stream | None = None
        self._missing_ends = False
        self._block: bytearray | None = None  # of headers that go on in further frames
        self._block_stream = 0
        self._block_ends = False
        self._last = 0  # the latest stream
        self._read_bytes = 0  # not granted anew yet: so little that the window is never used up
        self._window = USUAL_WINDOW
        self.first_window = USUAL_WINDOW
        self._frame_limit = USUAL_FRAME
        self._blocked: dict[Stream, None] = {}  # in the order in which they are to send
        self._unblocking = False
        self._tableless = False  # the other end was told that its table stays empty
        self._lead = b""  # of the next header block
        self._out: list[bytes] = []
        self._unread: set[int] = set()  # streams answered in this turn whose request goes on
        self._retiring = False
        self._refusing = False  # streams that come now are passed over: they were told the last one
        self._failed = False

    # --- the loop's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._failed = True
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
        if self._failed:
            return
        self.heard = True
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            at = self._frames(data, 0 if self.greeted else self._preface(data))
        except Fault as fault:
            self._fail(fault)
            return
        for stream_id in self._unread:
            self._reset(stream_id, NO_ERROR)  # nobody reads the rest
        self._unread.clear()
        if at < len(data) and not self._failed:
            self._rest = data[at:]

    def eof_received(self) -> bool:
        return False  # half a connection is none

    def pause_writing(self) -> None:
        """The other end does not take what it is sent: no more is taken from it either."""
        if not self._failed:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._failed:
            self.heard = True  # it takes what it is sent, if slowly
            self._transport.resume_reading()

    # --- sending -----------------------------------------------------------------------------

    def answer(self, stream: Stream, head: bytes, body: bytes, trailers: bytes) -> None:
        """All of a response: the blocks of its headers and trailers, and its body."""
        size = len(body)
        room = min(self.first_window + stream.widened, self._window, self._frame_limit)
        if size > room:
            self.begin(stream, head)
            self.send(stream, body, trailers)
            return
        stream.widened -= size
        self._window -= size
        head = self._led(head)
        stream_id = stream.stream_id
        self._write(
            _frame(HEADERS, END_HEADERS, stream_id, head)
            + _frame(DATA, 0, stream_id, body)
            + _frame(HEADERS, END_HEADERS | END_STREAM, stream_id, trailers)
        )
        self._finish(stream)
        if not self.streams:
            self._flush()  # nothing else will come that could go out with it

    def begin(self, stream: Stream, head: bytes, *, end: bool = False) -> None:
        """The headers of a response, which may be all of it."""
        self._headers_out(stream, head, end)
        if end:
            self._finish(stream)

    def send(self, stream: Stream, data: bytes, trailers: bytes | None = None) -> None:
        """Bytes of a response's body, and what ends it. Calls `stream.sent` when they are gone."""
        stream.unsent = memoryview(bytes(stream.unsent) + data if stream.unsent else data)
        stream.trailers = trailers
        self._blocked[stream] = None
        self._unblock()

    def reset(self, stream: Stream, code: int) -> None:
        """Ends a stream at once, with one of HTTP/2's error codes."""
        self._drop(stream)
        self._reset(stream.stream_id, code)

    def grant(self, stream: Stream, size: int) -> None:
        """The other end may send so many bytes more of a request that goes on."""
        if stream.open and not stream.ended:
            stream.granted += size
            self._grant(stream.stream_id, size)

    def ping(self) -> None:
        """Asks for a sign of life."""
        self._write(_frame(PING, 0, 0, b"keepaliv"))

    def retire(self) -> None:
        """Tells the other end to go elsewhere; what is on its way already is answered."""
        if not self.greeted:
            self.close()
        elif not self._retiring:
            self._retiring = True
            self._write(_goaway(LAST_STREAM, NO_ERROR))
            self._write(_frame(PING, 0, 0, RETIRING))  # its answer comes behind all that is

    def close(self) -> None:
        """Ends the connection once all that was written has gone out."""
        if not self._failed:
            self._flush()
            self._failed = True
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection now."""
        self._failed = True
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
        self.greeted = True
        self._greet()
        return len(PREFACE)

    def _greet(self) -> None:
        settings = (
            (MOST_STREAMS, self._most_streams),
            (FIRST_WINDOW, STREAM_WINDOW),
            (FRAME_LIMIT, FRAME_BYTES),
            (HEADERS_LIMIT, HEADERS_BYTES),
        )
        self._write(_frame(SETTINGS, 0, 0, b"".join(_setting.pack(*one) for one in settings)))
        self._grant(0, CONNECTION_WINDOW - USUAL_WINDOW)

    def _frames(self, data: bytes, at: int) -> int:
        """Takes in all whole frames, and of DATA what there is; returns where the rest begins."""
        if not self.greeted:
            return at
        end = len(data)
        if self._missing:
            at = self._go_on(data, end)
        while end - at >= FRAME_HEAD and not self._failed:
            size = int.from_bytes(data[at : at + 3], "big")
            kind, flags = data[at + 3], data[at + 4]
            stream_id = int.from_bytes(data[at + 5 : at + 9], "big") & LAST_STREAM
            if size > FRAME_BYTES:
                raise Fault(FRAME_SIZE_ERROR, f"a frame of {size} bytes; {FRAME_BYTES} are allowed")
            start = at + FRAME_HEAD
            after = start + size
            if self._block is not None and (kind, stream_id) != (CONTINUATION, self._block_stream):
                raise Fault(PROTOCOL_ERROR, "headers must go on before anything else comes")
            if not self._settled:
                if kind != SETTINGS or flags & ACK:
                    raise Fault(PROTOCOL_ERROR, "settings must come first")
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
                    self._unread.discard(stream_id)
            elif after > end:
                break
            else:
                self._frame(kind, flags, stream_id, data[start:after])
            at = after
        return at

    def _go_on(self, data: bytes, end: int) -> int:
        """More of a DATA frame whose beginning was handed on."""
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
            self._headers(flags, stream_id, payload)
        elif kind == WINDOW_UPDATE:
            self._widened(stream_id, payload)
        elif kind == RST_STREAM:
            self._was_reset(stream_id, payload)
        elif kind == PING:
            self._pinged(flags, stream_id, payload)
        elif kind == SETTINGS:
            self._settings(flags, stream_id, payload)
        elif kind == DATA:
            self._padded(flags, stream_id, payload)
        elif kind == CONTINUATION:
            self._continuation(flags, stream_id, payload)
        elif kind == PRIORITY:
            if len(payload) != 5 or not stream_id:
                raise Fault(FRAME_SIZE_ERROR if stream_id else PROTOCOL_ERROR, "PRIORITY")
        elif kind == GOAWAY:
            if stream_id or len(payload) < 8:
                raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "GOAWAY")
        elif kind == PUSH_PROMISE:
            raise Fault(PROTOCOL_ERROR, "only servers push")
        # All others are extensions, and passed over (RFC 9113, 5.5).

    def _body(self, stream_id: int, size: int) -> Stream | None:
        """The stream that so many bytes are for, which they have been counted for; None where it
        has ended here."""
        self._read_bytes += size
        if self._read_bytes >= GRANT_ALL_BYTES:
            self._grant(0, self._read_bytes)
            self._read_bytes = 0
        stream = self.streams.get(stream_id)
        if stream is None:
            self._must_have_been(stream_id, "DATA")
            return None
        if stream.ended:
            self._break(stream, STREAM_CLOSED)
            return None
        if size > stream.granted:
            self._break(stream, FLOW_CONTROL_ERROR)
            return None
        stream.granted -= size
        return stream

    def _padded(self, flags: int, stream_id: int, payload: bytes) -> None:
        stream = self._body(stream_id, len(payload))
        start, end = _within_padding(flags, payload)
        if stream is not None:
            self.grant(stream, len(payload) - (end - start))  # nobody else will read the padding
            stream.received(payload, start, end)
            if flags & END_STREAM:
                self._end(stream)

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise Fault(PROTOCOL_ERROR, f"a request on stream {stream_id}")
        start, end = _within_padding(flags, payload)
        if flags & WITH_PRIORITY:
            start += 5
            if start > end:
                raise Fault(FRAME_SIZE_ERROR, "HEADERS without all of its priority")
        if end - start > MOST_HEADERS_BYTES:
            raise Fault(ENHANCE_YOUR_CALM, f"headers of more than {MOST_HEADERS_BYTES} bytes")
        if flags & END_HEADERS:
            block = payload[start:end] if flags & (PADDED | WITH_PRIORITY) else payload
            self._whole_block(stream_id, block, bool(flags & END_STREAM))
        else:
            self._block = bytearray(payload[start:end])
            self._block_stream, self._block_ends = stream_id, bool(flags & END_STREAM)

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None:
            raise Fault(PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload and not flags & END_HEADERS:
            raise Fault(ENHANCE_YOUR_CALM, "CONTINUATION with nothing in it")
        self._block += payload
        if len(self._block) > MOST_HEADERS_BYTES:
            raise Fault(ENHANCE_YOUR_CALM, f"headers of more than {MOST_HEADERS_BYTES} bytes")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._whole_block(stream_id, block, self._block_ends)

    def _whole_block(self, stream_id: int, block: bytes, ends: bool) -> None:
        try:
            head = self._heads.read(block)  # whatever it is for: the next one builds on it
        except Unreadable as error:
            raise Fault(COMPRESSION_ERROR, str(error)) from None
        stream = self.streams.get(stream_id)
        if stream is not None:
            if not ends:
                self._break(stream, PROTOCOL_ERROR)  # trailers end a request
            elif stream.ended:
                self._break(stream, STREAM_CLOSED)
            else:
                self._end(stream)
        elif stream_id > self._last:
            if self._refusing:
                return
            self._last = stream_id
            if head.malformed:
                self._reset(stream_id, PROTOCOL_ERROR)
            elif len(self.streams) >= self._most_streams:
                self._reset(stream_id, REFUSED_STREAM)
            else:
                self._begin(stream_id, head, ends)

    def _begin(self, stream_id: int, head: Head, ends: bool) -> None:
        stream = self._make(self, stream_id, head)
        if isinstance(stream, bytes):
            self._write(_frame(HEADERS, END_HEADERS | END_STREAM, stream_id, self._led(stream)))
            if not ends:
                self._unread.add(stream_id)
        elif stream.open:  # it may have been answered already
            self.streams[stream_id] = stream
            if ends:
                self._end(stream)

    def _end(self, stream: Stream) -> None:
        if stream.open:
            stream.ended = True
            stream.request_ended()

    def _was_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(FRAME_SIZE_ERROR, "RST_STREAM")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._must_have_been(stream_id, "RST_STREAM")
        else:
            self._drop(stream)
            stream.aborted()

    def _widened(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        size = _window(payload)[0] & MOST_WINDOW
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
            if not size or self.first_window + stream.widened > MOST_WINDOW:
                self._break(stream, FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR)
        self._unblock_soon()

    def _pinged(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) != 8:
            raise Fault(PROTOCOL_ERROR if stream_id else FRAME_SIZE_ERROR, "PING")
        if not flags & ACK:
            self._write(_frame(PING, ACK, 0, payload))
        elif payload == RETIRING and self._retiring and not self._refusing:
            self._refusing = True
            self._write(_goaway(self._last, NO_ERROR))
            self._leave()

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Fault(PROTOCOL_ERROR, "settings of a stream")
        if flags & ACK:
            if payload:
                raise Fault(FRAME_SIZE_ERROR, "SETTINGS")
            return
        if len(payload) % 6:
            raise Fault(FRAME_SIZE_ERROR, "SETTINGS")
        for name, value in _setting.iter_unpack(payload):
            if name == FIRST_WINDOW:
                if value > MOST_WINDOW:
                    raise Fault(FLOW_CONTROL_ERROR, f"windows of {value} bytes")
                self.first_window = value
            elif name == TABLE_SIZE:
                if value < USUAL_TABLE and not self._tableless:
                    # A block must say so that uses no table all the same (RFC 7541, 4.2); it holds
                    # for whatever size comes later.
                    self._tableless, self._lead = True, NO_TABLE
            elif name == FRAME_LIMIT:
                if not USUAL_FRAME <= value < 1 << 24:
                    raise Fault(PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_limit = value
            elif name == ENABLE_PUSH and value > 1:
                raise Fault(PROTOCOL_ERROR, f"push {value}")
        self._write(_frame(SETTINGS, ACK, 0))
        self._unblock_soon()

    def _must_have_been(self, stream_id: int, kind: str) -> None:
        """What comes for a stream that has ended crossed our answer; others there can't be."""
        if stream_id > self._last and self._refusing and stream_id & 1:
            return
        if stream_id > self._last or not stream_id & 1:
            raise Fault(PROTOCOL_ERROR, f"{kind} on stream {stream_id}, which never began")

    # --- ends --------------------------------------------------------------------------------

    def _break(self, stream: Stream, code: int) -> None:
        """The other end broke the protocol within one stream."""
        self.reset(stream, code)
        stream.aborted()

    def _finish(self, stream: Stream) -> None:
        """All of the response is on its way; who still sends is told that nobody reads it."""
        if not stream.ended:
            self._reset(stream.stream_id, NO_ERROR)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        stream.open = False
        self.streams.pop(stream.stream_id, None)
        self._blocked.pop(stream, None)
        stream.gone()
        if self._refusing:
            self._leave()

    def _leave(self) -> None:
        if not self.streams:
            self._loop.call_soon(self.close)

    def _fail(self, fault: Fault) -> None:
        self._write(_goaway(self._last, fault.code, str(fault)[:200]))
        self.close()

    # --- writing -----------------------------------------------------------------------------

    def _unblock_soon(self) -> None:
        """Once a turn, however many frames widen the windows: there may be many streams to ask."""
        if self._blocked and not self._unblocking:
            self._unblocking = True
            self._loop.call_soon(self._unblock)

    def _unblock(self) -> None:
        """Sends what the windows allow, a frame a stream in turn."""
        self._unblocking = False
        while able := [
            stream for stream in self._blocked if self._room(stream) or not stream.unsent
        ]:
            for stream in able:
                self._send_some(stream)

    def _room(self, stream: Stream) -> int:
        """How much of a stream may be sent now, in bytes."""
        return max(0, min(self.first_window + stream.widened, self._window, self._frame_limit))

    def _send_some(self, stream: Stream) -> None:
        size = min(len(stream.unsent), self._room(stream))
        if size:
            self._write(_frame(DATA, 0, stream.stream_id, bytes(stream.unsent[:size])))
            stream.unsent = stream.unsent[size:]
            stream.widened -= size
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
        block = self._led(block)
        flags, rest = END_STREAM if end else 0, b""
        if len(block) > USUAL_FRAME:
            block, rest = block[:USUAL_FRAME], block[USUAL_FRAME:]
        self._write(_frame(HEADERS, flags | (0 if rest else END_HEADERS), stream.stream_id, block))
        while rest:
            block, rest = rest[:USUAL_FRAME], rest[USUAL_FRAME:]
            self._write(_frame(CONTINUATION, 0 if rest else END_HEADERS, stream.stream_id, block))

    def _led(self, block: bytes) -> bytes:
        """A header block, behind what the next one must begin with."""
        lead, self._lead = self._lead, b""
        return lead + block

    def _reset(self, stream_id: int, code: int) -> None:
        self._write(_frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))

    def _grant(self, stream_id: int, size: int) -> None:
        self._write(_frame(WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big")))

    def _write(self, data: bytes) -> None:
        """What is written in one turn of the loop goes out together."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and not self._failed:
            out, self._out = self._out, []
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    head = len(payload) << 48 | kind << 40 | flags << 32 | stream_id
    return head.to_bytes(FRAME_HEAD, "big") + payload


def _goaway(last: int, code: int, why: str = "") -> bytes:
    payload = last.to_bytes(4, "big") + code.to_bytes(4, "big") + why.encode()
    return _frame(GOAWAY, 0, 0, payload)


def _within_padding(flags: int, payload: bytes) -> tuple[int, int]:
    """Where a payload begins and ends."""
    if not flags & PADDED:
        return 0, len(payload)
    if not payload or payload[0] >= len(payload):
        raise Fault(PROTOCOL_ERROR, "more padding than there is room for")
    return 1, len(payload) - payload[0]
