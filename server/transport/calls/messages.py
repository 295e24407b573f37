"""gRPC messages in the body of a request: length prefix, compression, limits.

Format: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md, "Length-Prefixed-Message".
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from grpc import StatusCode

from server.transport.compression import (
    WINDOW_BITS,
    DecompressionError,
    Inflater,
    TooLargeError,
)
from server.transport.methods import Abort

PREFIX_BYTES = 5  # one byte for the compressed flag, four for the length
SMALL_PIECE_BYTES = 4096  # smaller pieces are joined: each separate object costs 200 bytes


class MessageError(Exception):
    """The body breaks gRPC's message format or a limit."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class MessageReader:
    """Cuts the body of one request into messages."""

    __slots__ = (
        "_encoding",
        "_limit_bytes",
        "_missing",
        "_pieces",
        "_prefix",
        "compressed",
        "started_s",
    )

    def __init__(self, encoding: str, limit_bytes: int) -> None:
        """`encoding` is the request's grpc-encoding header; messages are at most `limit_bytes`."""
        self._encoding = encoding
        self._limit_bytes = limit_bytes
        self._prefix = b""  # of a message: fewer than its five bytes
        self._missing = 0  # bytes of the current message that have not come
        self._pieces: list[bytes | bytearray | memoryview] = []  # of the current message
        self.compressed = False  # whether the latest message is
        self.started_s: float | None = None  # when an incomplete message started to arrive

    @property
    def is_inside_message(self) -> bool:
        return bool(self._missing or self._prefix)

    def read(self, data: bytes, start: int, end: int) -> tuple[int, bytes | None]:
        """Reads data[start:end] up to the end of the current message.

        Returns where it stopped, and the message if it is complete. Raises MessageError.
        """
        if self._missing:
            return self._continue(data, start, end)
        if self._prefix or end - start < PREFIX_BYTES:
            take = min(PREFIX_BYTES - len(self._prefix), end - start)
            self._prefix += data[start : start + take]
            start += take
            if self.started_s is None:
                self.started_s = time.monotonic()
            if len(self._prefix) < PREFIX_BYTES:
                return start, None
            prefix, self._prefix = self._prefix, b""
        else:
            prefix = data[start : start + PREFIX_BYTES]
            start += PREFIX_BYTES
        size = int.from_bytes(prefix[1:], "big")
        self._check(prefix[0], size)
        self.compressed = prefix[0] == 1
        if start + size <= end:
            self.started_s = None
            return start + size, data[start : start + size]
        self._missing = size
        if self.started_s is None:
            self.started_s = time.monotonic()
        return start, None

    def clear(self) -> None:
        """Drops the received part of the current message."""
        self._pieces.clear()

    def keep_middle(self, data: bytes) -> bool:
        """Keeps bytes from the middle of a large message; returns False for other bytes."""
        size = len(data)
        if not SMALL_PIECE_BYTES <= size < self._missing:
            return False
        self._pieces.append(data)
        self._missing -= size
        return True

    def _continue(self, data: bytes, start: int, end: int) -> tuple[int, bytes | None]:
        take = min(self._missing, end - start)
        self._keep(data, start, start + take)
        self._missing -= take
        if self._missing:
            return start + take, None
        self.started_s = None
        message = b"".join(self._pieces)
        self._pieces.clear()
        return start + take, message

    def _keep(self, data: bytes, start: int, end: int) -> None:
        """Keeps a piece of a message. Copies it, unless it is most of `data`."""
        pieces, size = self._pieces, end - start
        if size >= SMALL_PIECE_BYTES:
            is_most = size < len(data) <= 2 * size
            pieces.append(memoryview(data)[start:end] if is_most else data[start:end])
        elif pieces and isinstance(pieces[-1], bytearray):
            pieces[-1] += data[start:end]
        else:
            pieces.append(bytearray(data[start:end]))

    def _check(self, flag: int, size: int) -> None:
        if size > self._limit_bytes:
            raise MessageError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"request: is {size:,} bytes; at most {self._limit_bytes:,} are allowed",
            )
        if flag > 1:
            raise MessageError(
                StatusCode.INTERNAL, f"request: its first byte is {flag}; 0 and 1 are allowed"
            )
        if flag and self._encoding not in WINDOW_BITS:
            raise MessageError(
                StatusCode.INTERNAL,
                "request: is compressed, but the header grpc-encoding does not say how",
            )


class MessageQueue:
    """Messages of one request that its method has not read, each with whether it is compressed."""

    __slots__ = ("_changed", "_loop", "_messages")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._messages: deque[tuple[bytes, bool]] = deque()
        self._changed: asyncio.Future[None] | None = None  # a streaming method waits for it

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: bytes, compressed: bool) -> None:
        self._messages.append((message, compressed))
        self.wake()

    def pop(self) -> tuple[bytes, bool]:
        return self._messages.popleft()

    def clear(self) -> None:
        self._messages.clear()

    def wake(self) -> None:
        """Lets `wait` return: a message came, or the request ended."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def wait(self) -> None:
        self._changed = self._loop.create_future()
        await self._changed


def whole_message(body: bytes, limit_bytes: int) -> bytes | None:
    """The message of a body that is one message without compression; None for other bodies."""
    size = len(body) - PREFIX_BYTES
    if 0 <= size <= limit_bytes and body.startswith(size.to_bytes(PREFIX_BYTES, "big")):
        return body[PREFIX_BYTES:]
    return None


async def decompressed(
    inflater: Inflater, message: bytes, encoding: str, limit: int, count: Callable[[int], None]
) -> bytes:
    """Inflates a message; `count` gets the size of each piece. Raises Abort, and what it raises."""
    try:
        return await inflater.inflate(message, encoding, limit, count)
    except TooLargeError as error:
        raise Abort(StatusCode.RESOURCE_EXHAUSTED, f"request: {error}") from None
    except DecompressionError as error:
        raise Abort(StatusCode.INVALID_ARGUMENT, f"request: {error}") from None


def framed(message: bytes, limit_bytes: int) -> bytes:
    """A response's message behind its prefix. Raises Abort if it is too large."""
    size = len(message)
    if size > limit_bytes:
        raise Abort(
            StatusCode.RESOURCE_EXHAUSTED,
            f"the response is {size:,} bytes; at most {limit_bytes:,} are allowed",
        )
    return size.to_bytes(PREFIX_BYTES, "big") + message
