"""Decompression of requests: piece by piece in a few threads, limited while it grows."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Self

WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's `wbits`
GZIP = "gzip"
GZIP_MAGIC = b"\x1f\x8b"

THREADS = (
    2  # a result grows by up to 400 MB/s a thread; more threads would take it from the engines
)
INPUT_PIECE_BYTES = 64 << 10
OUTPUT_PIECE_BYTES = 1 << 20  # then the sizes are counted, and it is the turn of other requests

# gzip allows several members in a row; zlib copies the rest of its input at the end of each, 10 us.
# bgzip, which writes the smallest members, puts 64 KiB into each.
FREE_MEMBERS = 64
MIN_MEMBER_BYTES = 4096  # on average, in a result with more members


class DecompressionError(Exception):
    """The bytes are not valid in the named encoding; the message says why."""


class TooLargeError(Exception):
    """The result would exceed the limit."""


class Inflater:
    """Inflates requests in THREADS threads. Used on the event loop's thread only.

    Each piece of a result is a task of its own: a large request does not hold up the others.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "inflate")

    async def inflate(
        self, data: bytes, encoding: str, limit: int, count: Callable[[int], None]
    ) -> bytes:
        """Decompresses gzip or deflate.

        `count` is called with the size of each piece, and may raise to end the work. Raises what
        `count` raises, DecompressionError, and TooLargeError for a result of more than `limit`
        bytes.
        """
        loop = asyncio.get_running_loop()
        stream = InflateStream(data, encoding, limit)
        while not stream.is_done:
            count(await loop.run_in_executor(self._threads, stream.next_piece))
        return stream.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the threads. Nothing may be inflated any more."""
        self._threads.shutdown(cancel_futures=True)


class InflateStream:
    """The decompressed bytes of one request, piece by piece. One thread at a time may use it."""

    def __init__(self, data: bytes, encoding: str, limit: int) -> None:
        self.is_done = False
        self._data = memoryview(data)
        self._encoding = encoding
        self._limit = limit
        self._position = 0  # in the data, of the next byte to give to zlib
        self._given = b""  # bytes that zlib has not taken
        self._result = BytesIO()
        self._size = 0  # of the result so far
        self._members = 1
        self._stream = zlib.decompressobj(WINDOW_BITS[encoding])

    def next_piece(self) -> int:
        """Adds OUTPUT_PIECE_BYTES to the result, or fewer at its end, and returns how many.

        Raises DecompressionError and TooLargeError.
        """
        began_at = self._size
        ends_at = began_at + OUTPUT_PIECE_BYTES
        while self._size < ends_at and not self.is_done:
            self._result.write(self._inflate(min(ends_at, self._limit + 1) - self._size))
        return self._size - began_at

    def result(self) -> bytes:
        """All pieces. CPython's BytesIO does not copy them."""
        return self._result.getvalue()

    def _inflate(self, wanted: int) -> bytes:
        """At most `wanted` bytes of the result from at most INPUT_PIECE_BYTES of the data."""
        given = self._given or self._next_input()
        try:
            piece = self._stream.decompress(given, wanted)
        except zlib.error as error:
            raise DecompressionError(f"is not valid {self._encoding}: {error}") from None
        self._given = self._stream.unconsumed_tail
        self._size += len(piece)
        if self._size > self._limit:
            raise TooLargeError(
                f"is more than {self._limit:,} bytes when decompressed; "
                f"at most {self._limit:,} are allowed"
            )
        if self._stream.eof:
            self._end_member()
        elif not (piece or self._given or self._position < len(self._data)):
            raise DecompressionError(f"its {self._encoding} ends too early")
        return piece

    def _next_input(self) -> bytes:
        piece = bytes(self._data[self._position : self._position + INPUT_PIECE_BYTES])
        self._position += len(piece)
        return piece

    def _end_member(self) -> None:
        """Ends the result, or begins the next member of a gzip file."""
        self._position -= len(self._stream.unused_data)
        self._given = b""
        if self._position == len(self._data):
            self.is_done = True
            return
        begin = self._data[self._position : self._position + len(GZIP_MAGIC)]
        if self._encoding != GZIP or begin != GZIP_MAGIC:
            raise DecompressionError(f"its {self._encoding} continues after its end")
        self._members += 1
        if self._members > FREE_MEMBERS + self._size // MIN_MEMBER_BYTES:
            raise DecompressionError(f"has {self._members:,} gzip members, most of them too small")
        self._stream = zlib.decompressobj(WINDOW_BITS[GZIP])
