"""Image files."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image

from server.errors import InvalidInput
from server.images.decode import decode
from server.images.input_spec import ImageLimits, InputSpec
from tests.fuzz.mutate import sometimes_mutated
from tests.fuzz.target import Target, parser

SPEC = InputSpec(16, 16, 3, 20)
LIMITS = ImageLimits(pixels=100_000, side=2_000)


@cache
def valid_files() -> tuple[bytes, ...]:
    pixels = np.random.default_rng(1).integers(0, 256, (12, 17, 3), np.uint8)
    image = Image.fromarray(pixels)
    files = []
    for kind, converted, options in (
        ("JPEG", image, {}),
        ("JPEG", image.convert("L"), {"progressive": True}),
        ("JPEG", image.convert("CMYK"), {"quality": 20}),
        ("PNG", image, {}),
        ("PNG", image.quantize(8), {}),
        ("PNG", image.convert("LA"), {}),
        ("PNG", image.convert("1"), {}),
        ("GIF", image, {}),
        ("WEBP", image, {}),
        ("WEBP", image.convert("RGBA"), {"lossless": True}),
        ("BMP", image, {}),
        ("BMP", image.quantize(8), {}),
    ):
        buffer = BytesIO()
        converted.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return tuple(files)


def make(draw: Random) -> bytes:
    return sometimes_mutated(draw.choice(valid_files()), draw, 0.9)


def read(data: bytes) -> None:
    if decode(data, SPEC, LIMITS).shape != SPEC.shape:
        raise AssertionError("the pixels have another shape")


TARGETS = (Target("images", make, parser(read, InvalidInput), 0.1),)
