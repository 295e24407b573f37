"""Fields are counted as the parser finds them, and counting ends at the limit."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from server.api.field_limit import SMALL_BYTES, has_more_fields
from server.api.stubs import classify_pb2 as pb

REQUEST = pb.ClassifyRequest.DESCRIPTOR
FILLER = b"\x0a" + b"\x80\x80\x01" + b"m" * SMALL_BYTES  # a model's name: one field, long enough


def images(count: int) -> bytes:
    """A request of `count` raw images: six fields each, and one of the model."""
    raw = pb.Image(raw=pb.RawImage(height=1, width=1, channels=1, data=b"x"))
    return FILLER + pb.ClassifyRequest(images=[raw] * count).SerializeToString()


def counted(data: bytes) -> int:
    """The number of fields, by trying limits."""
    limit = 0
    while has_more_fields(data, REQUEST, limit):
        limit += 1
    return limit


def test_the_fields_of_nested_messages_are_counted_too() -> None:
    assert counted(images(0)) == 1
    assert counted(images(3)) == 1 + 3 * 6
    pixels = pb.ClassifyRequest(pixels=pb.RawImages(count=1, height=1), version=1, top_k=2)
    assert counted(FILLER + pixels.SerializeToString()) == 1 + 3 + 2


def test_every_kind_of_unknown_field_counts_as_one() -> None:
    varint, fixed64, text, group, fixed32 = (
        b"\x78\xff\x01",
        b"\x79" + bytes(8),
        b"\x7a\x03\x08\x08\x08",
        b"\x7b\x08\x01\x7c",  # start, one field, end
        b"\x7d" + bytes(4),
    )
    assert counted(FILLER + varint + fixed64 + text + fixed32) == 5
    assert counted(FILLER + group) == 4


def test_small_messages_are_not_counted() -> None:
    assert not has_more_fields(b"\x1a\x00" * (SMALL_BYTES // 2), REQUEST, 1)
    assert has_more_fields(b"\x1a\x00" * SMALL_BYTES, REQUEST, 1)


def test_counting_ends_where_the_bytes_are_not_a_message() -> None:
    for broken in (b"\x78" + b"\xff" * 100, b"\x1a\x7f", b"\x7f\x00", b"\x79\x00"):
        assert counted(FILLER + broken) == 2
    endless = b"\x78" + b"\xff" * (1 << 20)
    assert not has_more_fields(endless, REQUEST, 1)


@given(st.binary(max_size=300))
def test_every_image_of_a_valid_message_is_counted(tail: bytes) -> None:
    data = FILLER + tail
    fields = counted(data)
    try:
        request = pb.ClassifyRequest.FromString(data)
    except DecodeError:
        return
    assert fields >= 1 + len(request.images)
