"""Typed contents of a message are read correctly."""

from __future__ import annotations

import numpy as np
import pytest

from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.messages import small_numbers
from server.errors import InvalidInput


def test_typed_pixels_are_read_for_all_values() -> None:
    values = np.random.default_rng(0).integers(0, 256, 5000)
    for numbers in (values, values[:1], np.zeros(200, int), np.full(127, 255), np.arange(256)):
        found = small_numbers(pb.InferTensorContents(uint_contents=numbers.tolist()), "contents")
        assert found.dtype == np.uint8
        assert found.tolist() == numbers.tolist()
    unknown = pb.InferTensorContents.FromString(b"\x22\x03\x05\xff\x01" + b"\x98\x06\x07")
    assert small_numbers(unknown, "contents").tolist() == [5, 255]
    for large in (256, 16_383, 16_384, (1 << 32) - 1):
        with pytest.raises(InvalidInput, match="above 255"):
            small_numbers(pb.InferTensorContents(uint_contents=[0, large, 5]), "contents")
