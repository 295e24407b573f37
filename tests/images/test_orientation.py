"""Promise: the Exif orientation is applied, and a damaged Exif block is ignored."""

import struct
from io import BytesIO

import pytest
from PIL import Image, ImageOps

from server.images.decode import decode
from server.images.input_spec import InputSpec
from tests.images.image_files import chunk, difference, encoded, noise


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    file = encoded(noise(40, 20), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")
    assert upright.size == ((40, 20) if orientation < 5 else (20, 40))
    pixels = decode(file, InputSpec(upright.height, upright.width, 3))
    assert difference(pixels, upright) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "form"), [(3, "HH"), (4, "I"), (1, "BBH")])
def test_the_orientation_may_have_any_integer_type(order: str, kind: int, form: str) -> None:
    value = struct.pack(order + form, 6, *[0] * (len(form) - 1))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    tag = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    exif = magic + struct.pack(order + "IH", 8, 1) + tag + b"\0\0\0\0"
    file = encoded(noise(40, 20), "JPEG", exif=b"Exif\0\0" + exif)
    reference = Image.open(BytesIO(file)).transpose(Image.Transpose.ROTATE_270)
    assert difference(decode(file, InputSpec(40, 20, 3)), reference) == 0


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\0\0\0\0",
        b"not exif at all",
    ],
)
def test_a_damaged_exif_block_is_ignored(exif: bytes) -> None:
    image = noise(40, 20)
    file = encoded(image, "PNG")
    file = file[:33] + chunk(b"eXIf", exif) + file[33:]
    assert difference(decode(file, InputSpec(20, 40, 3)), image) == 0
    file = encoded(image, "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(file, InputSpec(20, 40, 3)).shape == (20, 40, 3)
