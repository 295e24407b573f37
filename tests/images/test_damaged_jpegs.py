"""Promise: damaged JPEGs are refused, and whole ones with harmless oddities are decoded.

Every kind of JPEG is damaged in every way. libjpeg fills in missing pixels and only warns.
"""

import random
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.images.decode import decode
from server.images.formats import first_image
from server.images.input_spec import InputSpec
from server.images.jpeg import decode_jpeg
from tests.images.image_files import IMAGENET, difference, encoded, photo, rejection

EOI = b"\xff\xd9"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "optimised": ("RGB", {"optimize": True}),
    "full chroma": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "restart markers": ("RGB", {"restart_marker_blocks": 16}),
    "progressive with restart markers": ("RGB", {"progressive": True, "restart_marker_rows": 1}),
    "grey": ("L", {}),
    "grey progressive": ("L", {"progressive": True}),
    "cmyk": ("CMYK", {}),
}
WITH_RESTARTS = [kind for kind in KINDS if "restart" in kind]
WITHOUT_RESTARTS = [kind for kind in KINDS if "restart" not in kind]


def jpeg(kind: str) -> bytes:
    mode, options = KINDS[kind]
    return encoded(photo().resize((320, 214)).convert(mode), "JPEG", **options)


def pixels_of(file: bytes) -> Any:
    return decode(file, IMAGENET)


def data(file: bytes, scan: int = 0) -> tuple[int, int]:
    """Where the entropy-coded data of a scan starts and ends."""
    start = -1
    for _ in range(scan + 1):
        start = file.index(b"\xff\xda", start + 1)
    start += 2 + int.from_bytes(file[start + 2 : start + 4], "big")
    end = start
    while file[end] != 0xFF or file[end + 1] in (0, *range(0xD0, 0xD8)):
        end += 1
    return start, end


def zeroed(file: bytes) -> bytes:
    start, end = data(file)
    middle = (start + end) // 2
    return file[:middle] + bytes(400) + file[middle + 400 :]


def without_a_block(file: bytes) -> bytes:
    middle = len(file) // 2
    return file[: middle - 512] + file[middle + 512 :]


def half_with_an_end_marker(file: bytes) -> bytes:
    return file[: len(file) // 2] + EOI


def without_pixel_data(file: bytes) -> bytes:
    return file[: data(file)[0]] + EOI


def first_half_of_the_first_scan(file: bytes) -> bytes:
    start, end = data(file)
    return file[: (start + end) // 2] + file[end:]


def overwritten(file: bytes) -> bytes:
    start, _ = data(file)
    text = (b"HTTP/1.1 200 OK\r\n" * 30)[:400]
    return file[: start + 200] + text + file[start + 200 + len(text) :]


DAMAGE: list[Callable[[bytes], bytes]] = [
    zeroed,
    without_a_block,
    half_with_an_end_marker,
    without_pixel_data,
    first_half_of_the_first_scan,
    overwritten,
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_jpeg_has_pillows_pixels(kind: str) -> None:
    file = jpeg(kind)
    image = decode_jpeg(first_image(file))
    assert image is not None
    with Image.open(BytesIO(file)) as expected:
        assert difference(np.asarray(image.convert("RGB")), expected.convert("RGB")) == 0


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_jpeg_is_refused(kind: str, damage: Callable[[bytes], bytes]) -> None:
    assert "JPEG" in rejection(damage(jpeg(kind)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", WITHOUT_RESTARTS)
def test_zeroed_bytes_are_found_wherever_they_are(kind: str, seed: int) -> None:
    file, chance = jpeg(kind), random.Random(seed)
    start, end = data(file)
    count = chance.randrange(100, (end - start) // 2)
    place = chance.randrange(start, end - count)
    assert "damaged JPEG" in rejection(file[:place] + bytes(count) + file[place + count :])


@pytest.mark.parametrize("scans", [1, 2, 5, 9])
def test_a_progressive_jpeg_without_its_last_scans_is_refused(scans: int) -> None:
    """libjpeg does not warn: the image is only blurred."""
    file = jpeg("progressive")
    assert "scans are missing" in rejection(file[: data(file, scans - 1)[1]] + EOI)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stray", [b"\0", b"\0\0\0", b"\x12\x34\x56", b"\0" * 16, b"\xff\xff"])
def test_a_few_extraneous_bytes_before_the_end_are_ignored(kind: str, stray: bytes) -> None:
    file = jpeg(kind)
    padded = file[:-2] + stray + EOI
    assert difference(pixels_of(padded), pixels_of(file)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc4", b"\xff\xda"])
def test_a_few_extraneous_bytes_between_segments_are_ignored(kind: str, marker: bytes) -> None:
    file = jpeg(kind)
    at = file.rindex(marker)
    assert difference(pixels_of(file[:at] + b"\1\2\3" + file[at:]), pixels_of(file)) == 0


@pytest.mark.parametrize("kind", WITH_RESTARTS)
def test_a_few_extraneous_bytes_before_a_restart_marker_are_ignored(kind: str) -> None:
    file = jpeg(kind)
    at = file.index(b"\xff\xd3")
    assert difference(pixels_of(file[:at] + b"\0\0" + file[at:]), pixels_of(file)) == 0


@pytest.mark.parametrize("kind", WITHOUT_RESTARTS)
def test_damage_after_a_few_extraneous_bytes_is_found(kind: str) -> None:
    """libjpeg reports only the first warning."""
    file = jpeg(kind)
    if "progressive" in kind:
        end = data(file)[1]
        start = data(file, 1)[0]
        damaged = file[:end] + b"\1\2" + file[end : start + 20] + file[data(file, 1)[1] :]
        assert "damaged JPEG" in rejection(damaged)
    many = file[:-2] + random.Random(1).randbytes(40).replace(b"\xff", b"\0") + EOI
    assert "extraneous bytes after the pixels" in rejection(many)


def test_a_motion_jpeg_frame_without_huffman_tables_is_decoded() -> None:
    file = jpeg("baseline")
    frame = file
    while (at := frame.find(b"\xff\xc4")) >= 0:
        frame = frame[:at] + frame[at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big") :]
    assert len(frame) < len(file) - 400
    assert difference(pixels_of(frame), pixels_of(file)) == 0


@pytest.mark.parametrize("trailer", [b"\0" * 1000, b"a second file", b"\xff\xd8\xff\xe0"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_end_are_ignored(kind: str, trailer: bytes) -> None:
    file = jpeg(kind)
    assert difference(pixels_of(file + trailer), pixels_of(file)) == 0


def test_an_unknown_jfif_version_is_ignored() -> None:
    file = jpeg("baseline")
    assert file[6:11] == b"JFIF\0"
    assert difference(pixels_of(file[:11] + b"\2" + file[12:]), pixels_of(file)) == 0


def test_an_unknown_adobe_transform_is_ignored() -> None:
    file = jpeg("cmyk")
    at = file.index(b"Adobe") + 11
    with_2, with_7 = (file[:at] + value + file[at + 1 :] for value in (b"\2", b"\7"))
    assert difference(pixels_of(with_7), pixels_of(with_2)) == 0


def test_wrong_parameters_of_a_sequential_scan_are_ignored() -> None:
    file = jpeg("baseline")
    start = data(file)[0]
    assert file[start - 3 : start] == b"\0\x3f\0"
    odd = file[: start - 3] + b"\0\0\0" + file[start:]
    assert difference(pixels_of(odd), pixels_of(file)) == 0


@pytest.mark.parametrize("factors", [0x31, 0x42, 0x24])
def test_unusual_sampling_factors_are_left_to_pillow(factors: int) -> None:
    """simplejpeg does not know them. The pixels are those of another image, but they are whole."""
    file = bytearray(encoded(Image.new("RGB", (48, 48), "red"), "JPEG"))
    file[file.index(b"\xff\xc0") + 11] = factors
    assert decode_jpeg(first_image(bytes(file))) is None
    assert decode(bytes(file), InputSpec(48, 48, 3)).shape == (48, 48, 3)


@pytest.mark.parametrize("kind", ["optimised", "progressive", "grey"])
def test_a_blank_image_with_zero_bytes_is_whole(kind: str) -> None:
    """In an optimised table the shortest code, zeros, can mean an empty block."""
    mode, options = KINDS[kind]
    for colour in ("white", "black", "grey"):
        image = Image.new("RGB", (1200, 900), colour).convert(mode)
        file = encoded(image, "JPEG", **options, **({"optimize": True} if kind == "grey" else {}))
        assert pixels_of(file).shape == (224, 224, 3)


@pytest.mark.parametrize("size", [(40, 30), (1300, 900)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["baseline", "grey", "cmyk"])
def test_small_and_large_jpegs_are_decoded_alike(
    kind: str, orientation: int, size: tuple[int, int]
) -> None:
    mode, options = KINDS[kind]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(photo().resize(size).convert(mode), "JPEG", exif=exif, **options)
    stored = Image.open(BytesIO(file)).convert("RGB")
    upright = stored.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else stored
    for channels, colour in ((3, "RGB"), (1, "L")):
        pixels = decode(file, InputSpec(upright.height, upright.width, channels))
        expected = np.asarray(upright.convert(colour)).reshape(pixels.shape)
        assert difference(pixels, expected) == 0
