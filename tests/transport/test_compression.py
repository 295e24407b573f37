"""Requests are inflated piece by piece, and never beyond their limit."""

from __future__ import annotations

import asyncio
import gzip
import random
import time
import zlib
from collections.abc import Callable

import pytest

from server.transport.compression import (
    OUTPUT_PIECE_BYTES,
    DecompressionError,
    Inflater,
    InflateStream,
    TooLargeError,
)

LIMIT = 64 << 20
NOISE = random.Random(7).randbytes(3 * OUTPUT_PIECE_BYTES + 5)
ZEROS = bytes(5 * OUTPUT_PIECE_BYTES + 7)


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def inflated(data: bytes, encoding: str = "gzip", limit: int = LIMIT) -> bytes:
    stream = InflateStream(data, encoding, limit)
    size = 0
    while not stream.is_done:
        piece = stream.next_piece()
        assert piece <= OUTPUT_PIECE_BYTES
        size += piece
    assert len(stream.result()) == size
    return stream.result()


def test_the_result_comes_in_pieces_of_a_bounded_size() -> None:
    for data in (b"", b"x", NOISE, ZEROS, NOISE[:OUTPUT_PIECE_BYTES]):
        assert inflated(packed(data)) == data
        assert inflated(zlib.compress(data), "deflate") == data


def test_the_limit_is_exact_and_no_more_is_made() -> None:
    assert len(inflated(packed(ZEROS), limit=len(ZEROS))) == len(ZEROS)
    with pytest.raises(TooLargeError, match="more than 100 bytes when decompressed"):
        inflated(packed(bytes(101)), limit=100)
    bomb = packed(bytes(256 << 20))
    stream = InflateStream(bomb, "gzip", 3 << 20)
    for _ in range(3):
        assert stream.next_piece() == OUTPUT_PIECE_BYTES
    with pytest.raises(TooLargeError):
        stream.next_piece()


def test_the_members_of_a_gzip_file_are_joined() -> None:
    blocks = [NOISE[begin : begin + 65_280] for begin in range(0, len(NOISE), 65_280)]
    bgzip = b"".join(map(packed, blocks)) + packed(b"")
    assert inflated(bgzip) == NOISE


@pytest.mark.parametrize(
    ("name", "data", "encoding", "words"),
    [
        ("empty", b"", "gzip", "ends too early"),
        ("cut", packed(NOISE)[:-1], "gzip", "ends too early"),
        ("cut_in_the_second_member", packed(b"a") + packed(b"b")[:-9], "gzip", "ends too early"),
        ("not_gzip", b"no gzip at all", "gzip", "is not valid gzip"),
        ("garbage_behind", packed(b"a") + b"garbage", "gzip", "continues after its end"),
        ("one_byte_behind", packed(b"a") + b"\x1f", "gzip", "continues after its end"),
        ("deflate_twice", 2 * zlib.compress(b"a"), "deflate", "continues after its end"),
        ("wrong_checksum", packed(b"abc")[:-8] + bytes(8), "gzip", "is not valid gzip"),
        ("empty_members", 100_000 * packed(b""), "gzip", "65 gzip members"),
        ("tiny_members", 10_000 * packed(b"x"), "gzip", "gzip members, most of them too small"),
        ("empty_blocks", packed(b"")[:10] + 5_000_000 * b"\0\0\0\xff\xff", "gzip", "too early"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_bytes_that_are_not_the_encoding_are_refused(
    name: str, data: bytes, encoding: str, words: str
) -> None:
    began_s = time.thread_time()
    with pytest.raises(DecompressionError, match=words):
        inflated(data, encoding)
    assert time.thread_time() - began_s < 0.5


async def test_the_growing_result_is_counted_and_can_be_stopped() -> None:
    class Full(Exception):
        pass

    counted: list[int] = []

    def count(size: int) -> None:
        counted.append(size)
        if sum(counted) > 2 * OUTPUT_PIECE_BYTES:
            raise Full

    with Inflater() as inflater:
        assert await inflater.inflate(packed(b"abc"), "gzip", LIMIT, counted.append) == b"abc"
        assert counted == [3]
        with pytest.raises(Full):
            await inflater.inflate(packed(ZEROS), "gzip", LIMIT, count)
        assert sum(counted) <= 4 * OUTPUT_PIECE_BYTES


async def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    """Both threads inflate bombs; the pieces of a small request come between theirs."""
    bomb = packed(bytes(LIMIT))
    ended: list[str] = []

    def ends(name: str) -> Callable[[object], None]:
        return lambda _: ended.append(name)

    with Inflater() as inflater:
        tasks = []
        for name, data in (*(("large", bomb),) * 6, ("small", packed(b"abc"))):
            work = inflater.inflate(data, "gzip", LIMIT, lambda size: None)
            tasks.append(asyncio.create_task(work))
            tasks[-1].add_done_callback(ends(name))
        await asyncio.gather(*tasks)
    assert ended[0] == "small"
