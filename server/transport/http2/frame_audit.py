"""Protocol errors that libnghttp2 overlooks: frames of streams that the client has ended itself.

The library ignores them, because it has forgotten the stream. They are the errors of a client in
development or of an attacker, so the check ends with the first frames of a connection: it costs
0.3 us for each.
"""

from __future__ import annotations

from ngh2.enums import ErrorCode

from server.transport.http2.preface import PREFACE

AUDITED_FRAMES = 500

DATA, HEADERS, PRIORITY, RST_STREAM = range(4)
END_STREAM, PADDED, WITH_PRIORITY = 0x1, 0x8, 0x20
HEAD_BYTES = 9
DEPENDENCY_MASK = 0x7FFF_FFFF


class FrameError(Exception):
    """A frame that the client may not send."""

    def __init__(self, code: ErrorCode) -> None:
        super().__init__("a frame of a stream that the client has ended, or not begun")
        self.code = code


class FrameAudit:
    """Reads the heads of the first frames of one connection, from the preface on."""

    __slots__ = ("_ended", "_highest", "_left", "_rest", "_skip", "_started")

    def __init__(self) -> None:
        self._left = AUDITED_FRAMES
        self._skip = len(PREFACE)  # bytes to the head of the next frame
        self._rest = b""  # the start of that head
        self._highest = 0
        self._started: set[int] = set()  # streams
        self._ended: set[int] = set()  # streams for which the client may send nothing more

    @property
    def is_over(self) -> bool:
        return self._left <= 0

    def check(self, data: bytes) -> None:
        """Checks the next bytes of the connection. Raises FrameError."""
        data, self._rest = self._rest + data, b""
        at, size = self._skip, len(data)
        while at + HEAD_BYTES <= size and self._left > 0:
            self._left -= 1
            length = int.from_bytes(data[at : at + 3], "big")
            error = self._frame(data, at, length)
            if error is not None:
                raise FrameError(error)
            at += HEAD_BYTES + length
        self._skip = max(0, at - size)
        self._rest = data[at:]

    def _frame(self, data: bytes, at: int, length: int) -> ErrorCode | None:
        kind, flags = data[at + 3], data[at + 4]
        stream = int.from_bytes(data[at + 5 : at + HEAD_BYTES], "big") & DEPENDENCY_MASK
        payload = at + HEAD_BYTES
        if kind == PRIORITY:
            return self._priority(stream, data[payload : payload + min(length, 4)])
        if kind not in (DATA, HEADERS, RST_STREAM):
            return None
        if kind != RST_STREAM and stream in self._ended:
            return ErrorCode.STREAM_CLOSED
        if kind == HEADERS:
            if stream < self._highest and stream not in self._started:
                return ErrorCode.PROTOCOL_ERROR
            self._started.add(stream)
            self._highest = max(self._highest, stream)
        if kind == RST_STREAM or flags & END_STREAM:
            self._ended.add(stream)
        if kind == HEADERS and flags & WITH_PRIORITY and not flags & PADDED:
            return self._priority(stream, data[payload : payload + min(length, 4)])
        return None

    def _priority(self, stream: int, dependency: bytes) -> ErrorCode | None:
        """Priorities are ignored, but must have a stream, and not depend on it themselves."""
        depends_on = int.from_bytes(dependency, "big") & DEPENDENCY_MASK
        if not stream or (len(dependency) == 4 and depends_on == stream):
            return ErrorCode.PROTOCOL_ERROR
        return None
