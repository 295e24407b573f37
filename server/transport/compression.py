"""Decompression of requests with a limit on the result."""

from __future__ import annotations

import zlib

WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's `wbits`


class DecompressionError(Exception):
    """The bytes are not valid in the named encoding; the message says why."""


class TooLargeError(Exception):
    """The result would exceed the limit."""


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """Decompresses gzip or deflate.

    Raises DecompressionError, and TooLargeError for a result of more than `limit` bytes.
    """
    inflater = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise DecompressionError(f"is not valid {encoding}: {error}") from None
    if len(inflated) > limit:
        raise TooLargeError(
            f"is more than {limit:,} bytes when decompressed; at most {limit:,} are allowed"
        )
    if not inflater.eof or inflater.unused_data:
        where = "continues after its end" if inflater.eof else "ends too early"
        raise DecompressionError(f"its {encoding} {where}")
    return inflated
