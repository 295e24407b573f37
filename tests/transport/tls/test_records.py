"""Whole TLS records come out of a stream, whatever pieces it arrives in."""

from __future__ import annotations

import ssl

from hypothesis import given, settings
from hypothesis import strategies as st

from server.transport.tls.records import RecordQueue

MAX_RECORDS, MAX_BYTES = 3, 100


def record(size: int) -> bytes:
    return b"\x17\x03\x03" + size.to_bytes(2, "big") + bytes(size % 251 for _ in range(size))


def drained(queue: RecordQueue, to: ssl.MemoryBIO) -> int:
    """How many records come out until no more do."""
    count = 0
    while passed := queue.pass_on(to, MAX_RECORDS, MAX_BYTES):
        assert passed <= MAX_RECORDS + 1  # one had begun before
        count += passed
    return count


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    waits=st.booleans(),
)
def test_records_come_out_whole_and_in_order(
    sizes: list[int], cuts: list[int], waits: bool
) -> None:
    stream = b"".join(record(size) for size in sizes)
    ends = sorted({cut for cut in cuts if cut < len(stream)} | {len(stream)})
    first, *rest = zip([0, *ends], ends, strict=False)
    queue, to, count = RecordQueue(stream[slice(*first)]), ssl.MemoryBIO(), 0
    for begin, end in rest:
        if not waits:  # for the connection's turn
            count += drained(queue, to)
        queue.put(stream[begin:end])
    count += drained(queue, to)
    assert count == len(sizes)
    assert to.read() == stream
    assert queue.is_empty


def test_a_record_that_is_not_complete_stays() -> None:
    queue, to = RecordQueue(record(10)[:4]), ssl.MemoryBIO()
    assert queue.pass_on(to, MAX_RECORDS, MAX_BYTES) == 0
    queue.put(record(10)[4:14])
    assert queue.pass_on(to, MAX_RECORDS, MAX_BYTES) == 0
    assert to.pending == 0
    queue.put(record(10)[14:] + record(0))
    assert queue.pass_on(to, MAX_RECORDS, MAX_BYTES) == 2
    assert to.read() == record(10) + record(0)
