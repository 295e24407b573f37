"""Pixels in JSON are read correctly, in chunks of any size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from server.api.v2 import json_tensors


async def test_numbers_are_read_with_any_size_of_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for chunk in (1, 2, 3, 4, 5, 7, 64, 1 << 20):
        monkeypatch.setattr(json_tensors, "CHUNK_BYTES", chunk)
        for shape in ((1, 1, 1, 1), (2, 4, 3, 3)):
            values = rng.integers(0, 256, shape, dtype=np.uint8)
            for data in (values.tolist(), values.reshape(-1).tolist()):
                for text in (json.dumps(data), json.dumps(data, indent=1)):
                    found = json_tensors.numbers_from_json(text.encode(), shape, "data")
                    assert (found == values).all()
