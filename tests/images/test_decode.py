"""Every supported format, colour mode and kind of transparency is decoded correctly."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.images.image_files import (
    RED,
    WHITE,
    chunk,
    decoded,
    difference,
    encoded,
    photo,
    png,
    rejection,
    run_length_bmp,
)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_every_format_is_decoded(format: str) -> None:
    kinds: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    image = photo().resize((60, 40))
    if format == "GIF":
        image = image.quantize(64).convert("RGB")
    file = encoded(image, format, **kinds.get(format, {}))
    expected = Image.open(BytesIO(file)) if format == "JPEG" else image  # JPEG is never exact
    assert difference(decoded(file), expected) == 0


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"optimize": True}])
def test_every_kind_of_jpeg_is_decoded(options: dict[str, Any]) -> None:
    file = encoded(photo(), "JPEG", **options)
    assert difference(decoded(file), Image.open(BytesIO(file))) == 0


def test_an_mpo_file_is_decoded_as_its_first_jpeg() -> None:
    first = photo().resize((60, 40))
    file = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 30))])
    assert Image.open(BytesIO(file)).format == "MPO"
    assert difference(decoded(file), Image.open(BytesIO(file))) == 0


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_only_the_first_frame_is_decoded(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert difference(decoded(file), frames[0]) <= 3  # WebP is lossy


def test_later_frames_are_not_read() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert difference(decoded(file[:-8]), frames[0]) == 0


def test_only_small_run_length_bmps_are_decoded() -> None:
    """Pillow decodes it in Python: 50,000,000 pixels in 400 KB would take minutes."""
    pixels = decoded(run_length_bmp(8, 2, b"\x08\x05\0\0\x08\x09\0\0\0\1"))
    assert pixels[:, 0].tolist() == [[9, 246, 9], [5, 250, 5]]
    assert "run-length" in rejection(run_length_bmp(7000, 7000, b"\xff\x05" * 1000))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_grey_is_copied_to_all_channels(format: str) -> None:
    grey = photo().convert("L").resize((30, 20))
    file = encoded(grey, format)
    reference = np.asarray(Image.open(BytesIO(file)))
    assert difference(decoded(file), np.stack([reference] * 3, axis=2)) == 0
    assert difference(decoded(file, channels=1)[:, :, 0], reference) == 0


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF"])
def test_one_bit_becomes_black_and_white(format: str) -> None:
    image = Image.fromarray(np.eye(9, 17, dtype=np.uint8) * 255).convert("1")
    expected = np.eye(9, 17, dtype=np.uint8) * 255
    assert difference(decoded(encoded(image, format), channels=1)[:, :, 0], expected) == 0
    assert difference(decoded(encoded(image, format))[:, :, 2], expected) == 0


@pytest.mark.parametrize("colours", [2, 4, 16, 256])
@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF"])
def test_palette_indices_become_colours(format: str, colours: int) -> None:
    image = photo().resize((60, 40)).quantize(colours)
    assert difference(decoded(encoded(image, format)), image.convert("RGB")) == 0
    assert difference(decoded(encoded(image, format), 1)[:, :, 0], image.convert("L")) == 0


def test_cmyk_jpegs_keep_their_colours() -> None:
    image = Image.new(
        "CMYK", (32, 32), (0, 255, 255, 0)
    )  # red; Pillow writes it inverted, as Adobe
    assert difference(decoded(encoded(image, "JPEG")), np.full((32, 32, 3), RED)) <= 2


def test_ycck_jpegs_keep_their_colours() -> None:
    luma_of_inverse = (179, 171, 1, 255)  # Y, Cb, Cr of cyan, and no black, all inverted
    file = encoded(Image.new("CMYK", (32, 32), tuple(255 - v for v in luma_of_inverse)), "JPEG")
    adobe = file.index(b"Adobe")
    assert file[adobe + 11] == 0
    ycck = file[: adobe + 11] + b"\2" + file[adobe + 12 :]
    assert difference(decoded(ycck), np.full((32, 32, 3), RED)) <= 3


def sixteen_bit(*shape: int) -> NDArray[np.uint16]:
    return np.random.default_rng(3).integers(0, 65536, shape, np.uint16)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_sixteen_bits_are_reduced_to_the_upper_eight(colour: int, channels: int) -> None:
    wide = sixteen_bit(10, 12, channels)
    file = png(12, 10, depth=16, colour=colour, samples=wide.astype(">u2").tobytes())
    upper = (wide >> 8).astype(np.uint8)
    assert difference(decoded(file, channels), upper) == 0
    assert difference(decoded(file), np.broadcast_to(upper, (10, 12, 3))) == 0


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_sixteen_bits_with_alpha_are_blended_with_white(colour: int, channels: int) -> None:
    wide = sixteen_bit(10, 12, channels)
    wide[..., -1] = np.where(np.arange(12) < 6, 0, 65535)
    file = png(12, 10, depth=16, colour=colour, samples=wide.astype(">u2").tobytes())
    expected = np.broadcast_to((wide[..., :-1] >> 8), (10, 12, 3)).copy()
    expected[:, :6] = 255
    assert difference(decoded(file), expected) == 0


@pytest.mark.parametrize(("colour", "key"), [(0, (258,)), (2, (258, 770, 1))])
def test_the_transparent_colour_of_sixteen_bits_becomes_white(
    colour: int, key: tuple[int, ...]
) -> None:
    wide = np.full((2, 3, len(key)), 0x8000, np.uint16)
    wide[0, 0] = key
    file = png(
        3,
        2,
        depth=16,
        colour=colour,
        samples=wide.astype(">u2").tobytes(),
        extra=chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
    )
    expected = np.full((2, 3, 3), 0x80)
    expected[0, 0] = 255
    assert difference(decoded(file), expected) == 0


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_blended_with_white(mode: str, format: str) -> None:
    image = Image.new(mode, (30, 10), (0, 0) if mode == "LA" else (0, 0, 0, 0))  # clear black
    solid, half = ((100, 255), (100, 128)) if mode == "LA" else (RED + (255,), RED + (128,))
    image.paste(solid, (10, 0, 20, 10))
    image.paste(half, (20, 0, 30, 10))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    pixels = decoded(encoded(image, format, **options))
    colour = np.array(RED if mode == "RGBA" else (100, 100, 100))
    assert difference(pixels[0, 5], WHITE) == 0
    assert difference(pixels[0, 15], colour) == 0
    assert difference(pixels[0, 25], np.round(colour * (128 / 255) + 127).astype(int)) <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_opaque_alpha_channel_changes_nothing(format: str) -> None:
    image = photo().resize((30, 20)).quantize(32).convert("RGBA")
    options = {"lossless": True} if format == "WEBP" else {}
    assert difference(decoded(encoded(image, format, **options)), image.convert("RGB")) == 0


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255, 255]), bytes([255, 0, 128, 255])])
def test_transparent_palette_entries_become_white(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 2, 3] * 2)
    pixels = decoded(encoded(image, "PNG", transparency=transparency))
    half = isinstance(transparency, bytes) and transparency[2] == 128
    expected = [(0, 0, 0), WHITE, (255, 127, 127) if half else RED, (0, 255, 0)]
    assert difference(pixels[1], expected) <= (1 if half else 0)


@pytest.mark.parametrize(
    ("mode", "transparency"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0), ("P", 7)]
)
def test_a_transparent_colour_becomes_white(mode: str, transparency: Any) -> None:
    first = 0 if mode == "1" else 7
    image = Image.new("L", (4, 2), first)
    image.paste(255, (2, 0, 4, 2))
    if mode == "P":
        image.putpalette([v for v in range(256) for _ in range(3)])
    elif mode != "L":
        image = image.convert(mode)
    format = "GIF" if mode == "P" else "PNG"
    pixels = decoded(encoded(image, format, transparency=transparency))
    assert difference(pixels, np.full((2, 4, 3), 255)) == 0


def test_colour_profiles_are_ignored() -> None:
    image = photo().resize((30, 20))
    assert difference(decoded(encoded(image, "PNG", icc_profile=b"no profile")), image) == 0


def bmp_with_alpha(header_bytes: int, alpha: int) -> bytes:
    """A red image of 32 bits a pixel; the header is version 3, 4 or 5, and names an alpha mask."""
    pixels = bytes([0, 0, 255, alpha]) * 6
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", header_bytes, 3, 2, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    header = (header + masks).ljust(header_bytes, b"\0")
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + pixels


@pytest.mark.parametrize("header_bytes", [56, 108, 124])
def test_a_bmp_with_an_unused_alpha_channel_is_opaque(header_bytes: int) -> None:
    file = bmp_with_alpha(header_bytes, 0)
    assert Image.open(BytesIO(file)).getchannel("A").getextrema() == (0, 0)
    assert difference(decoded(file), np.full((2, 3, 3), RED)) == 0
    half = decoded(bmp_with_alpha(header_bytes, 128))
    assert difference(half, np.full((2, 3, 3), (255, 127, 127))) <= 1


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_without_a_visible_pixel_is_ignored(mode: str, file_format: str) -> None:
    colour = RED if mode == "RGBA" else (100,)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    file = encoded(Image.new(mode, (4, 2), (*colour, 0)), file_format, **options)
    assert difference(decoded(file), np.broadcast_to(colour, (2, 4, 3))) == 0


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_palette_without_a_visible_colour_is_opaque(file_format: str) -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    file = encoded(image, file_format, transparency=1)
    assert difference(decoded(file), np.full((2, 4, 3), RED)) == 0


@pytest.mark.parametrize(("colour", "value"), [(0, (258,)), (2, (258, 770, 1))])
def test_sixteen_bits_without_a_visible_pixel_are_decoded_as_opaque(
    colour: int, value: tuple[int, ...]
) -> None:
    wide = np.full((2, 3, len(value)), value, ">u2")
    key = chunk(b"tRNS", struct.pack(f">{len(value)}H", *value))
    file = png(3, 2, depth=16, colour=colour, samples=wide.tobytes(), extra=key)
    expected = np.broadcast_to((wide >> 8).astype(np.uint8), (2, 3, 3))
    assert difference(decoded(file), expected) == 0
