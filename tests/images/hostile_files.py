"""Files that are not images, are damaged, or make a naive decoder hang or run out of memory."""

import random
import struct
import zlib

from tests.images.image_files import chunk, encoded, noise, png


def webp_header(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size


def gif_header(width: int, height: int, frame: bytes = b"") -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame + b";"


def bmp_header(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


HUGE_FRAME = b"," + struct.pack("<HHHHB", 65_535, 65_535, 65_535, 65_535, 0) + b"\x08\x01\x00\x00"

JPEG, PNG_FILE = encoded(noise(40, 20), "JPEG"), encoded(noise(40, 20), "PNG")
WEBP = encoded(noise(40, 20), "WEBP")

NOT_IMAGES = {
    "text": b"what is in this image?",
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
    "gif without frame": gif_header(10, 10),
    "gif of size 0": gif_header(0, 0, b",\0\0\0\0\0\0\0\0\0\x08\0"),
    "gif half": encoded(noise(40, 20), "GIF")[:-400],
    "webp signature": b"RIFF\0\0\0\0WEBP",
    "webp header": WEBP[:30],
    "webp half": WEBP[: len(WEBP) // 2],
    "webp of nothing": webp_header(10, 10),
    "webp of noise": WEBP[:40] + random.Random(2).randbytes(len(WEBP) - 40),
    "bmp signature": b"BM",
    "bmp header": bmp_header(10, 10),
    "bmp half": encoded(noise(40, 20), "BMP")[:1000],
    "bmp of size 0": bmp_header(0, 10),
    "bmp of width -1": bmp_header(-1, 10),
}


BOMBS = {
    "png": png(100_000, 100_000),
    "png of the largest size": png(2**31 - 1, 2**31 - 1),
    "png between our limit and Pillow's": png(8_000, 8_000),
    "png over Pillow's warning": png(10_000, 10_000),
    "png of one row": png(40_000_000, 1),
    "jpeg": JPEG.replace(struct.pack(">HH", 20, 40), b"\xff\xff\xff\xff"),
    "webp": webp_header(65_536, 65_535),
    "webp of the largest side": webp_header(1 << 24, 2),
    "gif canvas": gif_header(65_535, 65_535, HUGE_FRAME),
    "gif frame": gif_header(10, 10, HUGE_FRAME),
    "gif frame between our limit and Pillow's": gif_header(
        10, 10, b"," + struct.pack("<HHHHB", 0, 0, 8_000, 8_000, 0) + b"\x08\x01\x00\x00"
    ),
    "bmp": bmp_header(100_000, 100_000),
    "bmp upside down": bmp_header(100_000, -100_000),
}


def jpeg_with(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def overlapping_exif() -> bytes:
    """Ten thousand Exif tags; the value of each is the whole megabyte."""
    tags = b"".join(struct.pack("<HHII", tag, 7, 1 << 20, 0) for tag in range(10_000))
    return (b"II*\0" + struct.pack("<IH", 8, 10_000) + tags).ljust((1 << 20) + 64, b"\0")


# (valid file, bytes that do not belong to the image, where to insert them)
WITH_BALLAST = {
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

# A decoder that reads each part would take minutes.
TOO_MANY_PARTS = {
    "png of tiny chunks": PNG_FILE[:33] + chunk(b"aaAa") * 1_000_000,
    "jpeg of tiny segments": jpeg_with(segment(0xE1, b"") * 5_000_000),
    "jpeg of tables": jpeg_with(segment(0xDB, b"\0" * 65 * 1000) * 300),
    "gif of tiny blocks": b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1 " * 9_000_000,
    "gif of tiny extensions": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * 6_000_000,
    "gif of junk": b"GIF89a\1\0\1\0\0\0\0" + b"x" * 9_000_000,
}
