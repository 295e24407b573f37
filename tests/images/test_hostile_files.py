"""Every file is decoded or rejected with a reason, in bounded time and memory."""

import gc
import random
import resource
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.errors import InvalidInput
from server.images.decode import decode
from server.images.formats import UnreadableImage, first_image
from server.images.input_spec import ImageLimits, InputSpec
from tests.images.hostile_files import BOMBS, DAMAGED, NOT_IMAGES, TOO_MANY_PARTS, WITH_BALLAST
from tests.images.image_files import (
    IMAGENET,
    PHOTOGRAPHS,
    encoded,
    noise,
    photo,
    rejection,
    run_length_bmp,
)

PART = b"4e1b9c77 a part of the file"
FOREIGN = {
    b"II*\0": "is a TIFF file",
    b"MM\0*": "is a TIFF file",
    b"\0\0\0\x18ftypheic": "is a HEIC file",
    b"\0\0\0\x1cftypavif": "is an AVIF file",
    b"\0\0\0\x0cJXL \r\n": "is a JPEG XL file",
    b"\xff\x0a": "is a JPEG XL file",
    b"%PDF-1.7": "is a PDF file",
    b"PK\x03\x04": "is a ZIP archive",
    b"\x1f\x8b\x08": "is a gzip file",
    b"\n <svg xmlns=": "is an HTML, XML or SVG text",
    b'{"image": ': "is a JSON text",
    b"/9j/4AAQSkZJRg": "is an image as base64 text",
    b"data:image/png;base64,": "is an image as base64 text",
    b"\0\1\2\3": "has an unknown signature",
    b"": "has an unknown signature",
}


def test_an_empty_file_is_rejected() -> None:
    assert rejection(b"").startswith("is empty; a JPEG, PNG, WebP, BMP or GIF file is needed")


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_a_file_of_another_type_is_rejected_without_showing_it(name: str) -> None:
    description = rejection(NOT_IMAGES[name])
    assert f"{len(NOT_IMAGES[name]):,} bytes" in description
    assert "which is not a supported format" in description
    assert not NOT_IMAGES[name] or repr(NOT_IMAGES[name][:16])[2:-1] not in description
    assert "a JPEG, PNG, WebP, BMP or GIF file is needed" in description


@pytest.mark.parametrize("start", FOREIGN, ids=[repr(start) for start in FOREIGN])
def test_the_error_says_what_a_foreign_file_seems_to_be(start: bytes) -> None:
    with pytest.raises(UnreadableImage) as caught:
        first_image(start + PART)
    assert str(caught.value) == f"{FOREIGN[start]}, which is not a supported format"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_rejected_with_its_format(name: str) -> None:
    description = rejection(DAMAGED[name])
    assert f"{len(DAMAGED[name]):,} bytes" in description
    assert name.split()[0] in description.lower()
    assert "object at 0x" not in description


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_rejected_by_its_header(name: str) -> None:
    began = time.process_time()
    assert "50,000,000" in rejection(BOMBS[name])
    assert time.process_time() - began < 1


def test_limits_are_exact() -> None:
    file = encoded(noise(40, 20), "PNG")
    assert decode(file, IMAGENET, ImageLimits(len(file), 800, 40)).shape == (224, 224, 3)
    assert f"at most {len(file) - 1:,}" in rejection(file, ImageLimits(encoded_bytes=len(file) - 1))
    assert "40 x 20 pixels" in rejection(file, ImageLimits(pixels=799))
    assert "39 a side" in rejection(file, ImageLimits(side=39))


@pytest.mark.parametrize("cut", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_truncated_file_is_never_decoded(cut: str) -> None:
    whole = encoded(photo().resize((90, 60)), cut)
    for kept in range(1, len(whole) * 9 // 10, max(1, len(whole) // 60)):
        rejection(whole[:kept])


@pytest.mark.parametrize("name", WITH_BALLAST)
def test_metadata_and_trailing_bytes_are_not_read(name: str) -> None:
    plain, ballast, where = WITH_BALLAST[name]
    began = time.process_time()
    heavy = decode(plain[:where] + ballast + plain[where:], IMAGENET)
    assert time.process_time() - began < 3
    assert np.array_equal(heavy, decode(plain, IMAGENET))


@pytest.mark.parametrize("name", TOO_MANY_PARTS)
def test_a_file_with_too_many_parts_is_rejected_quickly(name: str) -> None:
    began = time.process_time()
    assert "more than" in rejection(TOO_MANY_PARTS[name])
    assert time.process_time() - began < 3


def test_a_jpeg_with_too_many_scans_is_rejected() -> None:
    file = encoded(noise(64, 64), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    assert "Inconsistent progression" in rejection(file[:-2] + file[last:-2] * 20 + file[-2:])
    assert "64 scans" in rejection(file[:-2] + file[last:-2] * 100 + file[-2:])
    large = file.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 7000, 7000))
    assert "in all scans" in rejection(large[:-2] + file[last:-2] * 20 + large[-2:])


def test_two_thousand_corrupted_files_are_decoded_or_rejected() -> None:
    chance = random.Random(2015)
    small = photo().resize((48, 36))
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
    decoded_files = rejected = 0
    for number in range(2000):
        file = bytearray(originals[number % len(originals)])
        # changes in the header have the largest effect
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
            rejected += 1
        else:
            assert pixels.shape == (32, 32, 3)
            decoded_files += 1
    assert decoded_files > 200
    assert rejected > 200


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_rejected_files_leak_no_memory() -> None:
    hostile = [*DAMAGED.values(), *BOMBS.values()]
    # most of an image that takes 1 MB when decoded
    big = photo().resize((600, 400))
    hostile += [encoded(big, name)[:-3000] for name in ("JPEG", "PNG", "GIF", "BMP")]

    def reject_all() -> None:
        for file in hostile:
            rejection(file)

    for _ in range(2):
        reject_all()
    before = resident_bytes()
    tracemalloc.start()
    try:
        reject_all()
        gc.collect()  # automatic collection of old objects is too rare for an exact count
        objects = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            reject_all()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - objects < 200_000
    finally:
        tracemalloc.stop()
    assert resident_bytes() - before < 12 << 20  # four leaked images a round would take 24 MB


def test_threads_do_not_affect_each_other() -> None:
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
