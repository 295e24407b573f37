"""Fields are counted as the parser finds them, and counting ends at the limit."""

from __future__ import annotations

import asyncio
import time

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from server.api.rpc.field_limit import (
    LIGHT_FIELDS,
    MAX_NAMED_FIELDS,
    MAX_SLOW_BYTES,
    SMALL_BYTES,
    MessageCheck,
    text_that_is_not_utf8,
)
from server.api.rpc.field_limit import check_fields as check_in_turns
from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from server.api.turns import WorkTurns
from server.errors import InvalidInput

REQUEST = pb.ClassifyRequest.DESCRIPTOR
INFER = oip.ModelInferRequest.DESCRIPTOR
FILLER = b"\x0a" + b"\x80\x80\x01" + b"m" * (16 << 10)  # a model's name: one field, long enough


def images(count: int) -> bytes:
    """A request of `count` raw images: six fields each, and one of the model."""
    raw = pb.Image(raw=pb.RawImage(height=1, width=1, channels=1, data=b"x"))
    return FILLER + pb.ClassifyRequest(images=[raw] * count).SerializeToString()


def check_fields(data: bytes, message: Descriptor, limit: int) -> None:
    """Checks all fields as the handlers do, without turns of the event loop."""
    if len(data) > SMALL_BYTES:
        MessageCheck(data, message, limit).read(limit + 1)


def has_more_fields(data: bytes, limit: int) -> bool:
    try:
        check_fields(data, REQUEST, limit)
    except InvalidInput as error:
        return f"more than {limit:,} fields" in str(error)
    return False


def counted(data: bytes) -> int:
    """The number of fields, by trying limits."""
    limit = 0
    while has_more_fields(data, limit):
        limit += 1
    return limit


def test_the_fields_of_nested_messages_are_counted_too() -> None:
    assert counted(images(0)) == 1
    assert counted(images(3)) == 1 + 3 * 6
    pixels = pb.ClassifyRequest(pixels=pb.RawImages(count=1, height=1), version=1, top_k=2)
    assert counted(FILLER + pixels.SerializeToString()) == 1 + 3 + 2


def test_every_kind_of_unknown_field_counts_as_one() -> None:
    varint, fixed64, text, fixed32 = (
        b"\x78\xff\x01",
        b"\x79" + bytes(8),
        b"\x7a\x03\x08\x08\x08",
        b"\x7d" + bytes(4),
    )
    assert counted(FILLER + varint + fixed64 + text + fixed32) == 5


def test_groups_are_refused() -> None:
    group = b"\x7b\x08\x01\x7c"  # start, one field, end
    with pytest.raises(InvalidInput, match="has a group"):
        check_fields(FILLER + group, REQUEST, 100)


def test_the_fields_may_be_checked_in_steps() -> None:
    check = MessageCheck(images(20), REQUEST, 1000)
    steps = 1
    while not check.read(10):
        steps += 1
    assert steps == 1 + (1 + 20 * 6) // 10


def test_the_cost_of_a_message_is_estimated_from_its_first_fields() -> None:
    data = images(20)[len(FILLER) :] * 100
    check = MessageCheck(data, REQUEST, 100_000)
    assert not check.read(LIGHT_FIELDS)
    assert 0.01 < check.cost_s(len(data)) < 0.02  # 12,000 fields
    check = MessageCheck(data, REQUEST, 5000)
    check.read(LIGHT_FIELDS)
    assert 0.0049 < check.cost_s(len(data)) < 0.0051  # it is refused at the limit


async def test_a_light_message_needs_no_turn() -> None:
    turns = WorkTurns()
    light = check_in_turns(images(5)[len(FILLER) :], REQUEST, 1000, turns)
    with pytest.raises(StopIteration):
        light.send(None)  # ends at once
    heavy = asyncio.create_task(check_in_turns(images(50), REQUEST, 1000, turns))
    await asyncio.sleep(0)
    assert not heavy.done()
    await heavy
    many = asyncio.create_task(check_in_turns(images(500), REQUEST, 1000, turns))
    with pytest.raises(InvalidInput, match="more than 1,000 fields"):
        await many


def test_small_messages_are_not_counted() -> None:
    assert not has_more_fields(b"\x1a\x00" * (SMALL_BYTES // 2), 1)
    assert has_more_fields(b"\x1a\x00" * SMALL_BYTES, 1)


def test_counting_ends_where_the_bytes_are_not_a_message() -> None:
    for broken in (b"\x78" + b"\xff" * 100, b"\x1a\x7f", b"\x7f\x00", b"\x79\x00"):
        assert counted(FILLER + broken) <= 2  # the broken one counts if its head is whole
    endless = b"\x78" + b"\xff" * (1 << 20)
    assert not has_more_fields(endless, 1)


@given(st.binary(max_size=300))
def test_every_image_of_a_valid_message_is_counted(tail: bytes) -> None:
    data = FILLER + tail
    fields = counted(data)
    try:
        request = pb.ClassifyRequest.FromString(data)
    except DecodeError:
        return
    assert fields >= 1 + len(request.images)


def tensor(**contents: list[int] | list[float]) -> bytes:
    """A request with typed contents, as clients without raw contents send them."""
    inputs = [
        oip.ModelInferRequest.InferInputTensor(
            name="image",
            datatype="FP32",
            shape=[1, 224, 224, 3],
            contents=oip.InferTensorContents(**contents),  # type: ignore[arg-type]
        )
    ]
    return oip.ModelInferRequest(model_name="tiny", inputs=inputs).SerializeToString()


def test_typed_contents_of_usual_size_pass() -> None:
    check_fields(tensor(fp32_contents=[0.5] * (64 * 150_528)), INFER, 100)  # 64 images
    check_fields(tensor(uint_contents=[255] * (16 * 150_528)), INFER, 100)


def test_numbers_that_take_long_to_parse_are_refused() -> None:
    numbers = tensor(uint_contents=[1] * (MAX_SLOW_BYTES // 2))
    check_fields(numbers, INFER, 100)
    with pytest.raises(InvalidInput, match="uint_contents: makes more than 8,388,608 bytes"):
        check_fields(numbers + numbers, INFER, 100)
    name = pb.ClassifyRequest(model="m" * (MAX_SLOW_BYTES + 1)).SerializeToString()
    with pytest.raises(InvalidInput, match="model: makes more than"):
        check_fields(name, REQUEST, 100)


def test_the_first_text_that_is_not_utf8_is_found_in_nested_messages_too() -> None:
    broken = tensor().replace(b"FP32", b"FP3\xff")
    assert text_that_is_not_utf8(broken, INFER) == "datatype"
    far = tensor() * MAX_NAMED_FIELDS + broken
    assert text_that_is_not_utf8(far, INFER) == ""
    assert text_that_is_not_utf8(tensor(), INFER) == ""
    assert text_that_is_not_utf8(b"\x1a\x05\x0a\xff", REQUEST) == ""


def test_a_broken_message_costs_what_it_costs_to_see_that_it_is_broken() -> None:
    """It took 9 s once: the rest of the message was read as unknown fields."""
    rest = b"\x1a\x00" * (8 << 20)
    nested = b""
    for _ in range(3000):
        size = len(nested)
        nested = b"\x1a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + nested
    began_s = time.thread_time()
    for data in (
        b"\x1a\x02\x0a\x50" + rest,
        rest + b"\x1a\x02\x0a\x50",
        nested,
        b"\x7b" * (1 << 24),
    ):
        check_refused(data)
    assert time.thread_time() - began_s < 0.5


def check_refused(data: bytes) -> None:
    try:
        check_fields(data, REQUEST, 3000)
        pb.ClassifyRequest.FromString(data)
    except DecodeError:
        text_that_is_not_utf8(data, REQUEST)
    except InvalidInput:
        pass
