"""Compressed requests, by gRPC or HTTP: small ones may become large, so all has a limit."""

from __future__ import annotations

import zlib

WINDOW_BITS = {"gzip": 31, "deflate": 15}  # of zlib


class Damaged(Exception):
    """The bytes are not what they are said to be; the message says in which way."""


class TooLarge(Exception):
    """It would be more than is allowed."""


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """What was compressed by one of `WINDOW_BITS`, at most so many bytes. Raises Damaged and
    TooLarge."""
    inflater = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise Damaged(f"is no {encoding}: {error}") from None
    if len(inflated) > limit:
        raise TooLarge(f"is more than {limit:,} bytes when inflated, which is all that is allowed")
    if not inflater.eof or inflater.unused_data:
        where = "goes on behind its end" if inflater.eof else "ends too early"
        raise Damaged(f"its {encoding} {where}")
    return inflated
