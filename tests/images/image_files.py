"""Image files for the tests, and comparisons of pixels."""

import struct
import zlib
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.errors import InvalidInput
from server.images.decode import decode
from server.images.input_spec import ImageLimits, InputSpec

IMAGENET = InputSpec(224, 224, 3, resize=256)


PHOTOGRAPHS = {
    "china.jpg": files("sklearn") / "datasets" / "images" / "china.jpg",
    "flower.jpg": files("sklearn") / "datasets" / "images" / "flower.jpg",
    "chelsea.png": files("skimage") / "data" / "chelsea.png",
    "astronaut.png": files("skimage") / "data" / "astronaut.png",
    "coffee.png": files("skimage") / "data" / "coffee.png",
}


RED, WHITE = (255, 0, 0), (255, 255, 255)


def photo(name: str = "china.jpg") -> Image.Image:
    return Image.open(BytesIO(PHOTOGRAPHS[name].read_bytes())).convert("RGB")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    samples: bytes | None = None,
    extra: bytes = b"",
) -> bytes:
    """A PNG; `samples` are whole rows without filter bytes, None for too few zero bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    filtered = b"\0" * 64
    if samples is not None:
        row = len(samples) // height
        filtered = b"".join(b"\0" + samples[y * row : (y + 1) * row] for y in range(height))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND")


def run_length_bmp(width: int, height: int, data: bytes) -> bytes:
    palette = b"".join(bytes([i, 255 - i, i, 0]) for i in range(256))
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def decoded(image_file: bytes, channels: int = 3) -> NDArray[np.uint8]:
    """Decodes a file at its own size."""
    with Image.open(BytesIO(image_file)) as image:
        return decode(image_file, InputSpec(image.height, image.width, channels))


def difference(left: NDArray[np.uint8], right: Any) -> int:
    right = np.asarray(right)
    assert left.shape == right.shape
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def rejection(image_file: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        decode(image_file, IMAGENET, limits or ImageLimits(), "images[7].encoded")
    assert caught.value.field == "images[7].encoded"
    return caught.value.description
