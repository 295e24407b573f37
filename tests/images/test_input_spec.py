"""An invalid input specification or limit is rejected when it is created."""

from typing import Any

import pytest

from server.images.input_spec import ImageLimits, InputSpec


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"height": 0}, "0 x 8"),
        ({"width": -1}, "8 x -1"),
        ({"channels": 4}, "not 4"),
        ({"resize": -1}, "not -1"),
        ({"interpolation": "psychic"}, "not 'psychic'"),
        ({"interpolation": "lanczos", "antialias": False}, "lanczos always smooths; set antialias"),
        ({"letterbox": True, "resize": 8}, "resize must be 0 with letterbox, not 8"),
        ({"fill": (1, 2)}, r"or 3 of them, not \[1, 2\]"),
        ({"fill": (256,)}, "fill must be one number from 0 to 255"),
    ],
)
def test_an_invalid_spec_is_rejected(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InputSpec(**{"height": 8, "width": 8, "channels": 3, **wrong})


@pytest.mark.parametrize("name", ["encoded_bytes", "pixels", "side", "resized_bytes"])
def test_a_limit_of_zero_is_rejected(name: str) -> None:
    limit: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        ImageLimits(**limit)


def test_a_limit_above_pillows_is_rejected() -> None:
    with pytest.raises(ValueError, match="at most 89,478,485, not 100,000,000"):
        ImageLimits(pixels=100_000_000)
