"""An image file or raw pixels become the model's pixels, or an InvalidInput that says why not."""

import gc
import random
import resource
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from server.errors import InvalidInput
from server.images.decode import batch_from_pixels, decode, from_pixels
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


def photograph(name: str = "china.jpg") -> Image.Image:
    return Image.open(BytesIO(PHOTOGRAPHS[name].read_bytes())).convert("RGB")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_is(image_file: bytes, channels: int = 3) -> NDArray[np.uint8]:
    """Decoded at its own size."""
    with Image.open(BytesIO(image_file)) as image:
        return decode(image_file, InputSpec(image.height, image.width, channels))


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
    """A PNG by its specification; `samples` are whole rows without filter bytes, zeros if None."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    picture = b"\0" * 64
    if samples is not None:
        row = len(samples) // height
        picture = b"".join(b"\0" + samples[y * row : (y + 1) * row] for y in range(height))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(picture))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND")


def torchvision(image: Image.Image, spec: InputSpec, resampling: int) -> NDArray[np.uint8]:
    """Resize(spec.resize) and CenterCrop(spec) of torchvision on a Pillow image, step by step."""
    width, height = image.size
    if width <= height:
        resized = (spec.resize, int(spec.resize * height / width))
    else:
        resized = (int(spec.resize * width / height), spec.resize)
    image = image.resize(resized, resampling)
    width, height = image.size
    if spec.width > width or spec.height > height:
        image = ImageOps.expand(
            image,
            (
                (spec.width - width) // 2 if spec.width > width else 0,
                (spec.height - height) // 2 if spec.height > height else 0,
                (spec.width - width + 1) // 2 if spec.width > width else 0,
                (spec.height - height + 1) // 2 if spec.height > height else 0,
            ),
        )
        width, height = image.size
    left, top = round((width - spec.width) / 2.0), round((height - spec.height) / 2.0)
    image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.asarray(image).reshape(spec.shape)


def difference(left: NDArray[np.uint8], right: Any) -> int:
    right = np.asarray(right)
    assert left.shape == right.shape
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def refusal(image_file: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        decode(image_file, IMAGENET, limits or ImageLimits(), "images[7].encoded")
    assert caught.value.field == "images[7].encoded"
    return caught.value.description


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_is_resized_and_cropped_as_torchvision_does(name: str) -> None:
    pixels = decode(PHOTOGRAPHS[name].read_bytes(), IMAGENET)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    reference = torchvision(photograph(name), IMAGENET, Image.Resampling.BILINEAR)
    assert difference(pixels, reference) == 0


@pytest.mark.parametrize(
    "size", [(640, 427), (427, 640), (256, 256), (224, 224), (257, 301), (10, 3), (9, 300), (1, 1)]
)
@pytest.mark.parametrize("crop", [(224, 224), (227, 227), (256, 300), (299, 100), (400, 401)])
def test_any_size_is_cropped_and_padded_where_torchvision_does(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    image, spec = noise(*size), InputSpec(*crop, 3, resize=256)
    reference = torchvision(image, spec, Image.Resampling.BILINEAR)
    assert difference(decode(encoded(image, "BMP"), spec), reference) == 0


@pytest.mark.parametrize("size", [(640, 427), (300, 512), (100, 90)])
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic"])
def test_every_interpolation_is_pillows(name: str, size: tuple[int, int]) -> None:
    image, resampling = noise(*size), Image.Resampling[name.upper()]
    file = encoded(image, "PNG")
    cut = InputSpec(224, 224, 3, resize=256, interpolation=name)
    assert difference(decode(file, cut), torchvision(image, cut, resampling)) == 0
    whole = InputSpec(32, 48, 3, interpolation=name)
    assert difference(decode(file, whole), image.resize((48, 32), resampling)) == 0


def test_a_grey_model_gets_luma() -> None:
    pixels = decode(encoded(photograph(), "PNG"), InputSpec(28, 28, 1))
    assert difference(pixels[:, :, 0], photograph().convert("L").resize((28, 28), 2)) == 0


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (65_535, 2)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_an_extreme_shape_costs_little(size: tuple[int, int], interpolation: str) -> None:
    """Resized whole, 1 x 50,000 would become 256 x 12,800,000."""
    file = encoded(noise(*size), "PNG")
    spec = InputSpec(224, 224, 3, resize=256, interpolation=interpolation)
    tracemalloc.start()
    try:
        began = time.process_time()
        assert decode(file, spec).shape == (224, 224, 3)
        assert decode(file, InputSpec(224, 224, 3, 0, interpolation)).shape == (224, 224, 3)
        assert time.process_time() - began < 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_every_format_is_read(format: str) -> None:
    kinds: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    image = photograph().resize((60, 40))
    if format == "GIF":
        image = image.quantize(64).convert("RGB")
    file = encoded(image, format, **kinds.get(format, {}))
    expected = Image.open(BytesIO(file)) if format == "JPEG" else image  # JPEG is never exact
    assert difference(as_is(file), expected) == 0


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"optimize": True}])
def test_every_kind_of_jpeg_is_read(options: dict[str, Any]) -> None:
    file = encoded(photograph(), "JPEG", **options)
    assert difference(as_is(file), Image.open(BytesIO(file))) == 0


def test_a_phones_mpo_is_read_as_its_first_jpeg() -> None:
    first = photograph().resize((60, 40))
    file = encoded(first, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 30))])
    assert Image.open(BytesIO(file)).format == "MPO"
    assert difference(as_is(file), Image.open(BytesIO(file))) == 0


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_only_the_first_frame_is_shown(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    file = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert difference(as_is(file), frames[0]) <= 3  # WebP is lossy


def test_frames_after_the_first_are_not_even_looked_at() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert difference(as_is(file[:-8]), frames[0]) == 0


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_grey_is_spread_over_the_channels(format: str) -> None:
    grey = photograph().convert("L").resize((30, 20))
    file = encoded(grey, format)
    reference = np.asarray(Image.open(BytesIO(file)))
    assert difference(as_is(file), np.stack([reference] * 3, axis=2)) == 0
    assert difference(as_is(file, channels=1)[:, :, 0], reference) == 0


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF"])
def test_one_bit_becomes_black_and_white(format: str) -> None:
    image = Image.fromarray(np.eye(9, 17, dtype=np.uint8) * 255).convert("1")
    expected = np.eye(9, 17, dtype=np.uint8) * 255
    assert difference(as_is(encoded(image, format), channels=1)[:, :, 0], expected) == 0
    assert difference(as_is(encoded(image, format))[:, :, 2], expected) == 0


@pytest.mark.parametrize("colours", [2, 4, 16, 256])
@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF"])
def test_palettes_are_resolved(format: str, colours: int) -> None:
    image = photograph().resize((60, 40)).quantize(colours)
    assert difference(as_is(encoded(image, format)), image.convert("RGB")) == 0
    assert difference(as_is(encoded(image, format), 1)[:, :, 0], image.convert("L")) == 0


def test_cmyk_jpegs_keep_their_colours() -> None:
    image = Image.new(
        "CMYK", (32, 32), (0, 255, 255, 0)
    )  # red; Pillow writes it inverted, as Adobe
    assert difference(as_is(encoded(image, "JPEG")), np.full((32, 32, 3), RED)) <= 2


def test_ycck_jpegs_keep_their_colours() -> None:
    luma_of_inverse = (179, 171, 1, 255)  # Y, Cb, Cr of cyan, and no black, all inverted
    file = encoded(Image.new("CMYK", (32, 32), tuple(255 - v for v in luma_of_inverse)), "JPEG")
    adobe = file.index(b"Adobe")
    assert file[adobe + 11] == 0
    ycck = file[: adobe + 11] + b"\2" + file[adobe + 12 :]
    assert difference(as_is(ycck), np.full((32, 32, 3), RED)) <= 3


def sixteen_bit(*shape: int) -> NDArray[np.uint16]:
    return np.random.default_rng(3).integers(0, 65536, shape, np.uint16)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_of_sixteen_bits_the_upper_eight_are_taken(colour: int, channels: int) -> None:
    wide = sixteen_bit(10, 12, channels)
    file = png(12, 10, depth=16, colour=colour, samples=wide.astype(">u2").tobytes())
    upper = (wide >> 8).astype(np.uint8)
    assert difference(as_is(file, channels), upper) == 0
    assert difference(as_is(file), np.broadcast_to(upper, (10, 12, 3))) == 0


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_sixteen_bits_with_alpha_lie_on_white(colour: int, channels: int) -> None:
    wide = sixteen_bit(10, 12, channels)
    wide[..., -1] = np.where(np.arange(12) < 6, 0, 65535)
    file = png(12, 10, depth=16, colour=colour, samples=wide.astype(">u2").tobytes())
    expected = np.broadcast_to((wide[..., :-1] >> 8), (10, 12, 3)).copy()
    expected[:, :6] = 255
    assert difference(as_is(file), expected) == 0


@pytest.mark.parametrize(("colour", "key"), [(0, (258,)), (2, (258, 770, 1))])
def test_the_transparent_colour_of_sixteen_bits_is_white(colour: int, key: tuple[int, ...]) -> None:
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
    assert difference(as_is(file), expected) == 0


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(mode: str, format: str) -> None:
    image = Image.new(mode, (30, 10), (0, 0) if mode == "LA" else (0, 0, 0, 0))  # clear black
    solid, half = ((100, 255), (100, 128)) if mode == "LA" else (RED + (255,), RED + (128,))
    image.paste(solid, (10, 0, 20, 10))
    image.paste(half, (20, 0, 30, 10))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    pixels = as_is(encoded(image, format, **options))
    colour = np.array(RED if mode == "RGBA" else (100, 100, 100))
    assert difference(pixels[0, 5], WHITE) == 0
    assert difference(pixels[0, 15], colour) == 0
    assert difference(pixels[0, 25], np.round(colour * (128 / 255) + 127).astype(int)) <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_opaque_alpha_changes_nothing(format: str) -> None:
    image = photograph().resize((30, 20)).quantize(32).convert("RGBA")
    options = {"lossless": True} if format == "WEBP" else {}
    assert difference(as_is(encoded(image, format, **options)), image.convert("RGB")) == 0


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255, 255]), bytes([255, 0, 128, 255])])
def test_transparent_palette_entries_are_white(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 2, 3] * 2)
    pixels = as_is(encoded(image, "PNG", transparency=transparency))
    half = isinstance(transparency, bytes) and transparency[2] == 128
    expected = [(0, 0, 0), WHITE, (255, 127, 127) if half else RED, (0, 255, 0)]
    assert difference(pixels[1], expected) <= (1 if half else 0)


@pytest.mark.parametrize(
    ("mode", "transparency"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0), ("P", 7)]
)
def test_a_transparent_colour_is_white(mode: str, transparency: Any) -> None:
    first = 0 if mode == "1" else 7
    image = Image.new("L", (4, 2), first)
    image.paste(255, (2, 0, 4, 2))
    if mode == "P":
        image.putpalette([v for v in range(256) for _ in range(3)])
    elif mode != "L":
        image = image.convert(mode)
    format = "GIF" if mode == "P" else "PNG"
    pixels = as_is(encoded(image, format, transparency=transparency))
    assert difference(pixels, np.full((2, 4, 3), 255)) == 0


def test_colour_profiles_are_ignored() -> None:
    image = photograph().resize((30, 20))
    assert difference(as_is(encoded(image, "PNG", icc_profile=b"no profile")), image) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_honoured(format: str, orientation: int) -> None:
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
def test_an_orientation_may_be_of_any_integer_type(order: str, kind: int, form: str) -> None:
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
def test_a_damaged_exif_block_leaves_the_picture_as_it_is(exif: bytes) -> None:
    image = noise(40, 20)
    file = encoded(image, "PNG")
    file = file[:33] + chunk(b"eXIf", exif) + file[33:]
    assert difference(decode(file, InputSpec(20, 40, 3)), image) == 0
    file = encoded(image, "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(file, InputSpec(20, 40, 3)).shape == (20, 40, 3)


def webp_claiming(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size


def gif_claiming(width: int, height: int, frame: bytes = b"") -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame + b";"


def bmp_claiming(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


HUGE_FRAME = b"," + struct.pack("<HHHHB", 65_535, 65_535, 65_535, 65_535, 0) + b"\x08\x01\x00\x00"
JPEG, PNG_FILE = encoded(noise(40, 20), "JPEG"), encoded(noise(40, 20), "PNG")
WEBP = encoded(noise(40, 20), "WEBP")

NOT_IMAGES = {
    "text": b"what is in this picture?",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "zip": b"PK\x03\x04" + bytes(60),
    "zeros": bytes(1000),
    "random": random.Random(1).randbytes(5000),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "tiff": encoded(noise(8, 8), "TIFF"),
    "ppm": encoded(noise(8, 8), "PPM"),
    "ico": encoded(noise(16, 16), "ICO"),
    "tga": encoded(noise(8, 8), "TGA"),
    "utf-8": "büld".encode(),
}

DAMAGED = {
    "jpeg signature": JPEG[:3],
    "jpeg header": JPEG[:100],
    "jpeg half": JPEG[: len(JPEG) * 2 // 3],
    "jpeg of fill": b"\xff\xd8" + b"\xff" * 1_000_000 + b"\0",
    "jpeg of nothing": b"\xff\xd8\xff\xd9",
    "jpeg 12 bit": JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "jpeg of height 0": JPEG.replace(struct.pack(">HH", 20, 40), struct.pack(">HH", 0, 40)),
    "png signature": PNG_FILE[:8],
    "png half": PNG_FILE[: len(PNG_FILE) // 2],
    "png without end": PNG_FILE[:-12],
    "png checksum of header": PNG_FILE[:29] + b"\0\0\0\0" + PNG_FILE[33:],
    "png checksum of pixels": PNG_FILE[:-16] + b"\0\0\0\0" + PNG_FILE[-12:],
    "png without header": PNG_FILE[:8] + PNG_FILE[33:],
    "png of width 0": png(0, 10),
    "png without pixels": PNG_FILE[:33] + chunk(b"IEND"),
    "png of too few pixels": png(100, 100),
    "png of unknown depth": png(10, 10, depth=7),
    "png of bad deflate": PNG_FILE[:33] + chunk(b"IDAT", b"nonsense") + chunk(b"IEND"),
    "png palette short": png(4, 4, colour=3),
    "gif signature": b"GIF89a",
    "gif without frame": gif_claiming(10, 10),
    "gif of size 0": gif_claiming(0, 0, b",\0\0\0\0\0\0\0\0\0\x08\0"),
    "gif half": encoded(noise(40, 20), "GIF")[:-400],
    "webp signature": b"RIFF\0\0\0\0WEBP",
    "webp header": WEBP[:30],
    "webp half": WEBP[: len(WEBP) // 2],
    "webp of nothing": webp_claiming(10, 10),
    "webp of noise": WEBP[:40] + random.Random(2).randbytes(len(WEBP) - 40),
    "bmp signature": b"BM",
    "bmp header": bmp_claiming(10, 10),
    "bmp half": encoded(noise(40, 20), "BMP")[:1000],
    "bmp of size 0": bmp_claiming(0, 10),
    "bmp of width -1": bmp_claiming(-1, 10),
}

BOMBS = {
    "png": png(100_000, 100_000),
    "png of the largest size": png(2**31 - 1, 2**31 - 1),
    "png between our limit and Pillow's": png(8_000, 8_000),
    "png over Pillow's warning": png(10_000, 10_000),
    "png of one row": png(40_000_000, 1),
    "jpeg": JPEG.replace(struct.pack(">HH", 20, 40), b"\xff\xff\xff\xff"),
    "webp": webp_claiming(65_536, 65_535),
    "webp of the largest side": webp_claiming(1 << 24, 2),
    "gif canvas": gif_claiming(65_535, 65_535, HUGE_FRAME),
    "gif frame": gif_claiming(10, 10, HUGE_FRAME),
    "gif frame between our limit and Pillow's": gif_claiming(
        10, 10, b"," + struct.pack("<HHHHB", 0, 0, 8_000, 8_000, 0) + b"\x08\x01\x00\x00"
    ),
    "bmp": bmp_claiming(100_000, 100_000),
    "bmp upside down": bmp_claiming(100_000, -100_000),
}


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"").startswith("is empty; a JPEG, PNG, WebP, BMP or GIF file is needed")


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_refused_with_its_first_bytes(name: str) -> None:
    description = refusal(NOT_IMAGES[name])
    assert f"{len(NOT_IMAGES[name]):,} bytes" in description
    assert repr(NOT_IMAGES[name][:16]) in description
    assert "a JPEG, PNG, WebP, BMP or GIF file is needed" in description


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_what_it_was(name: str) -> None:
    description = refusal(DAMAGED[name])
    assert f"{len(DAMAGED[name]):,} bytes" in description
    assert name.split()[0] in description.lower()
    assert "object at 0x" not in description


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(name: str) -> None:
    began = time.process_time()
    assert "50,000,000" in refusal(BOMBS[name])
    assert time.process_time() - began < 1


def test_limits_are_exact() -> None:
    file = encoded(noise(40, 20), "PNG")
    assert decode(file, IMAGENET, ImageLimits(len(file), 800, 40)).shape == (224, 224, 3)
    assert f"at most {len(file) - 1:,}" in refusal(file, ImageLimits(encoded_bytes=len(file) - 1))
    assert "40 x 20 pixels" in refusal(file, ImageLimits(pixels=799))
    assert "39 a side" in refusal(file, ImageLimits(side=39))


@pytest.mark.parametrize("cut", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_truncated_file_is_never_half_an_image(cut: str) -> None:
    whole = encoded(photograph().resize((90, 60)), cut)
    for kept in range(1, len(whole) * 9 // 10, max(1, len(whole) // 60)):
        refusal(whole[:kept])


# What hangs or swells a decoder that reads everything in the file


def jpeg_with(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def overlapping_exif() -> bytes:
    """Ten thousand Exif tags, each of them the whole megabyte."""
    tags = b"".join(struct.pack("<HHII", tag, 7, 1 << 20, 0) for tag in range(10_000))
    return (b"II*\0" + struct.pack("<IH", 8, 10_000) + tags).ljust((1 << 20) + 64, b"\0")


HARMLESS = {
    "text bomb": (PNG_FILE, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000))), 33),
    "profile bomb": (PNG_FILE, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(20_000_000))), 33),
    "png exif": (PNG_FILE, chunk(b"eXIf", overlapping_exif()), 33),
    "png text chunks": (PNG_FILE, chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(10**6))) * 5000, 33),
    "many jpeg exif": (JPEG, segment(0xE1, b"Exif\0\0" + bytes(1000)) * 10_000, 2),
    "jpeg thumbnails": (JPEG, segment(0xE1, JPEG) * 1000, 2),
    "jpeg junk": (JPEG, b"\0" * 10_000_000, 20),
    "jpeg fill": (JPEG, b"\xff" * 10_000_000, 2),
    "jpeg trailer": (JPEG, b"\xff\xda" * 5_000_000, len(JPEG)),
    "png trailer": (PNG_FILE, bytes(10_000_000), len(PNG_FILE)),
}
HOSTILE = {
    "png of tiny chunks": PNG_FILE[:33] + chunk(b"aaAa") * 1_000_000,
    "jpeg of tiny segments": jpeg_with(segment(0xE1, b"") * 5_000_000),
    "jpeg of tables": jpeg_with(segment(0xDB, b"\0" * 65 * 1000) * 300),
    "gif of tiny blocks": b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1 " * 9_000_000,
    "gif of tiny extensions": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * 6_000_000,
    "gif of junk": b"GIF89a\1\0\1\0\0\0\0" + b"x" * 9_000_000,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_the_picture_is_never_read(name: str) -> None:
    plain, ballast, where = HARMLESS[name]
    began = time.process_time()
    heavy = decode(plain[:where] + ballast + plain[where:], IMAGENET)
    assert time.process_time() - began < 3
    assert np.array_equal(heavy, decode(plain, IMAGENET))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_endless_parts_is_refused_soon(name: str) -> None:
    began = time.process_time()
    assert "more than" in refusal(HOSTILE[name])
    assert time.process_time() - began < 3


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    file = encoded(noise(64, 64), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    assert decode(file[:-2] + file[last:-2] * 20 + file[-2:], IMAGENET).shape == (224, 224, 3)
    assert "64 scans" in refusal(file[:-2] + file[last:-2] * 100 + file[-2:])
    large = file.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 7000, 7000))
    assert "in all scans" in refusal(large[:-2] + file[last:-2] * 20 + large[-2:])


def run_length_bmp(width: int, height: int, data: bytes) -> bytes:
    palette = b"".join(bytes([i, 255 - i, i, 0]) for i in range(256))
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def test_a_run_length_bmp_is_read_while_it_is_small() -> None:
    """Pillow decodes it in Python: 50,000,000 pixels in 400 KB would take minutes."""
    pixels = as_is(run_length_bmp(8, 2, b"\x08\x05\0\0\x08\x09\0\0\0\1"))
    assert pixels[:, 0].tolist() == [[9, 246, 9], [5, 250, 5]]
    assert "run-length" in refusal(run_length_bmp(7000, 7000, b"\xff\x05" * 1000))


def test_two_thousand_mutilated_files_are_answered_or_refused() -> None:
    chance = random.Random(2015)
    small = photograph().resize((48, 36))
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [
        encoded(small, "JPEG", exif=exif),
        encoded(small, "JPEG", progressive=True),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(small, "PNG"),
        encoded(small.quantize(16), "PNG", transparency=3),
        encoded(small, "GIF", save_all=True, append_images=[small.rotate(9)]),
        encoded(small, "WEBP", exif=exif),
        encoded(small.convert("RGBA"), "WEBP", lossless=True),
        encoded(small, "BMP"),
        run_length_bmp(48, 2, b"\x30\x05\0\0\x30\x09\0\0\0\1"),
    ]
    spec = InputSpec(32, 32, 3, resize=36)
    answered = refused = 0
    for number in range(2000):
        file = bytearray(originals[number % len(originals)])
        # the header is where a changed byte matters most
        reach = chance.choice([64, 700, len(file)])
        for _ in range(chance.choice([1, 1, 2, 8, 40])):
            place = chance.randrange(min(reach, len(file)))
            match chance.randrange(5):
                case 0:
                    file[place] = chance.randrange(256)
                case 1:
                    file[place] ^= 1 << chance.randrange(8)
                case 2:
                    file[place : place + 2] = b"\xff\xff"
                case 3:
                    file[place:place] = chance.randbytes(chance.randrange(9))
                case 4:
                    del file[place : place + chance.randrange(9)]
            if not file:
                break
        try:
            pixels = decode(bytes(file), spec, ImageLimits(pixels=1_000_000))
        except InvalidInput:
            refused += 1
        else:
            assert pixels.shape == (32, 32, 3)
            answered += 1
    assert answered > 200
    assert refused > 200


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_refused_files_leave_no_memory_behind() -> None:
    hostile = [*DAMAGED.values(), *BOMBS.values()]
    # most of a picture that takes 1 MB when decoded
    big = photograph().resize((600, 400))
    hostile += [encoded(big, name)[:-3000] for name in ("JPEG", "PNG", "GIF", "BMP")]

    def round_of_all() -> None:
        for file in hostile:
            refusal(file)

    for _ in range(2):
        round_of_all()
    before = resident_bytes()
    tracemalloc.start()
    try:
        round_of_all()
        gc.collect()  # by itself it looks at old objects the less often the more there are
        objects = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            round_of_all()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - objects < 200_000
    finally:
        tracemalloc.stop()
    assert resident_bytes() - before < 12 << 20  # four lost pictures a round would be 24 MB


def test_threads_do_not_disturb_each_other() -> None:
    photographs = [path.read_bytes() for path in PHOTOGRAPHS.values()]
    work = [*photographs, *DAMAGED.values(), *photographs] * 2

    def outcome(file: bytes) -> bytes | str:
        try:
            return decode(file, IMAGENET).tobytes()
        except InvalidInput as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, work))
    assert together == [outcome(file) for file in work[: len(work) // 2]] * 2


def test_raw_pixels_of_the_models_shape_are_not_copied() -> None:
    data = noise(32, 16).tobytes()
    pixels = from_pixels(data, 16, 32, 3, InputSpec(16, 32, 3))
    assert np.shares_memory(pixels, np.frombuffer(data, np.uint8))
    assert pixels.tobytes() == data
    batch = batch_from_pixels(data, 4, 4, 32, 3, InputSpec(4, 32, 3, resize=99))
    assert np.shares_memory(batch, np.frombuffer(data, np.uint8))
    assert batch.shape == (4, 4, 32, 3)


def test_raw_pixels_of_another_size_go_the_way_of_a_file() -> None:
    image = photograph()
    pixels = from_pixels(image.tobytes(), image.height, image.width, 3, IMAGENET)
    assert np.array_equal(pixels, decode(encoded(image, "PNG"), IMAGENET))
    grey = image.convert("L")
    pixels = from_pixels(grey.tobytes(), grey.height, grey.width, 1, IMAGENET)
    assert np.array_equal(pixels, decode(encoded(grey, "PNG"), IMAGENET))


@pytest.mark.parametrize("resize", [0, 9])
def test_raw_channels_become_the_models(resize: int) -> None:
    image = photograph().resize((8, 6))
    grey = image.convert("L")
    size = (8, 6) if not resize else (7, 7)
    pixels = from_pixels(image.tobytes(), 6, 8, 3, InputSpec(size[1], size[0], 1, resize))
    expected = decode(encoded(image, "PNG"), InputSpec(size[1], size[0], 1, resize))
    assert np.array_equal(pixels, expected)
    pixels = from_pixels(grey.tobytes(), 6, 8, 1, InputSpec(size[1], size[0], 3, resize))
    expected = decode(encoded(grey, "PNG"), InputSpec(size[1], size[0], 3, resize))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1), (12, 16, 3), (5, 9, 1)])
@pytest.mark.parametrize("spec", [InputSpec(6, 8, 3), InputSpec(6, 8, 1), InputSpec(4, 4, 3, 5)])
def test_a_raw_batch_is_its_images_one_by_one(shape: tuple[int, int, int], spec: InputSpec) -> None:
    images = np.random.default_rng(5).integers(0, 256, (3, *shape), np.uint8)
    batch = batch_from_pixels(images.tobytes(), 3, *shape, spec)
    assert batch.flags.c_contiguous
    singles = [from_pixels(image.tobytes(), *shape, spec) for image in images]
    assert np.array_equal(batch, np.stack(singles))


@pytest.mark.parametrize(
    ("size", "part", "words"),
    [
        ((0, 8, 3), "height", "is 0; 1 to 65,535 is allowed"),
        ((8, 0, 3), "width", "is 0; 1 to 65,535 is allowed"),
        ((2**32 - 1, 2**32 - 1, 3), "height", "is 4,294,967,295; 1 to 65,535 is allowed"),
        ((8, 2**32 - 1, 3), "width", "is 4,294,967,295; 1 to 65,535 is allowed"),
        ((65_535, 65_535, 3), "height", "65,535 x 65,535 pixels are given; at most 50,000,000"),
        ((8, 8, 0), "channels", "is 0; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 4), "channels", "is 4; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 2**32 - 1), "channels", "is 4,294,967,295; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 1), "data", "has 192 bytes; 8 x 8 x 1 needs 64"),
        ((8, 9, 3), "data", "has 192 bytes; 8 x 9 x 3 needs 216"),
    ],
)
def test_wrong_raw_pixels_are_refused_with_the_field_and_what_is_allowed(
    size: tuple[int, int, int], part: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_pixels(bytes(192), *size, IMAGENET, field="images[2].raw")
    assert caught.value.field == f"images[2].raw.{part}"
    assert words in caught.value.description


def test_a_wrong_raw_batch_is_refused_with_the_field_and_what_is_allowed() -> None:
    def refused(data: bytes, count: int, side: int) -> tuple[str, str]:
        with pytest.raises(InvalidInput) as caught:
            batch_from_pixels(data, count, side, side, 3, IMAGENET)
        return caught.value.field, caught.value.description

    assert refused(b"", 0, 1) == ("pixels.count", "is 0; at least 1 is needed")
    assert refused(bytes(12), 2**32 - 1, 2)[0] == "pixels.data"
    assert refused(bytes(23), 2, 2) == ("pixels.data", "has 23 bytes; 2 x 2 x 2 x 3 needs 24")
    field, words = refused(bytes(30_000), 10_000, 1)
    assert field == "pixels.count"
    assert "10,000 images would take 1,505,280,000 bytes" in words


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"height": 0}, "0 x 8"),
        ({"width": -1}, "8 x -1"),
        ({"channels": 4}, "not 4"),
        ({"resize": -1}, "not -1"),
        ({"interpolation": "lanczos"}, "not 'lanczos'"),
    ],
)
def test_a_wrong_spec_is_refused_on_creation(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InputSpec(**{"height": 8, "width": 8, "channels": 3, **wrong})


@pytest.mark.parametrize("name", ["encoded_bytes", "pixels", "side", "resized_bytes"])
def test_a_limit_of_nothing_is_refused_on_creation(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        ImageLimits(**{name: 0})


def test_no_limit_may_stand_above_pillows() -> None:
    with pytest.raises(ValueError, match="at most 89,478,485, not 100,000,000"):
        ImageLimits(pixels=100_000_000)
