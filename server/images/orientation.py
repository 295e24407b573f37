"""Reads the orientation of an image from its metadata: Exif, or XMP if Exif has none.

The functions return 1 to 8 as Exif numbers the orientations, and 0 if there is no valid one. They
read a bounded part of the metadata: damaged metadata must neither hide the image nor cost time.
"""

import binascii
import re
import struct
import zlib
from collections.abc import Mapping

# Metadata to read, after decompression. The orientation is near the start of Exif and of XMP;
# thumbnails follow. A JPEG segment holds 64 KiB, which ImageMagick writes as 133 KB of digits.
MAX_METADATA_BYTES = 1 << 20

EXIF_HEADER = b"Exif\0\0"
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
TAG = 0x0112

_TIFF_PREFIX = re.compile(rb"xmlns:([\w.-]{1,64})\s*=\s*[\"']http://ns\.adobe\.com/tiff/1\.0/[\"']")
# An attribute, tiff:Orientation="6", or an element, <tiff:Orientation>6</tiff:Orientation>.
_XMP_TAG = re.compile(
    rb"([\w.-]{1,64}):Orientation"
    rb"(?:\s{0,64}=\s{0,64}[\"']|(?:\s[^<>]{0,256})?>)"
    rb"\s{0,64}([1-8])\s{0,64}[\"'<]"
)
_RAW_PROFILE = re.compile(rb"\s{0,64}[\w-]{1,64}\s{1,64}\d{1,20}\s")  # name and length
_WHITESPACE = b" \t\r\n\v\f"


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of an Exif block, with or without its header."""
    exif = exif.removeprefix(EXIF_HEADER)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 0
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == TAG:
                form = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
                (value,) = struct.unpack_from(order + form, exif, entry + 8)
                return int(value) if 1 <= value <= 8 else 0
    except struct.error:
        pass  # the image is usable without its Exif block
    return 0


def xmp_orientation(packet: bytes) -> int:
    """The property tiff:Orientation of an XMP packet."""
    prefixes = {b"tiff"}
    if declared := _TIFF_PREFIX.search(packet, 0, MAX_METADATA_BYTES):
        prefixes.add(declared[1])
    for prefix, value in _XMP_TAG.findall(packet, 0, MAX_METADATA_BYTES):
        if prefix in prefixes:
            return int(value)
    return 0


# Metadata of PNG files, the most important first. A "raw profile" of ImageMagick is Exif or XMP as
# hexadecimal digits in a text chunk. APP1 can be either.
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"Raw profile type APP1")
PNG_XMP = (b"XML:com.adobe.xmp", b"Raw profile type xmp", b"Raw profile type APP1")
PNG_METADATA = frozenset(PNG_EXIF + PNG_XMP)
PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})


def png_orientation(chunks: Mapping[bytes, tuple[bytes, memoryview]]) -> int:
    """The orientation in a PNG's metadata chunks: type and body, by type or keyword."""
    blocks = {name: _png_block(*chunks[name]) for name in chunks}
    for name in PNG_EXIF:
        if value := exif_orientation(blocks.get(name, b"")):
            return value
    for name in PNG_XMP:
        if value := xmp_orientation(blocks.get(name, b"").removeprefix(XMP_HEADER)):
            return value
    return 0


def _png_block(kind: bytes, body: memoryview) -> bytes:
    """The Exif block or XMP packet in a chunk; empty if the chunk is damaged."""
    if kind == b"eXIf":
        return bytes(body)
    keyword, _, text = bytes(body[: MAX_METADATA_BYTES << 1]).partition(b"\0")
    is_compressed = kind == b"zTXt"
    if kind == b"iTXt":
        is_compressed = text[:1] == b"\1"
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]  # language, translated keyword
    elif is_compressed:
        text = text[1:]  # the method, always deflate
    if is_compressed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_METADATA_BYTES)
        except zlib.error:
            return b""
    if not keyword.startswith(b"Raw profile"):
        return text
    start = _RAW_PROFILE.match(text)
    digits = text[start.end() if start else 0 :].translate(None, _WHITESPACE)
    try:
        return binascii.unhexlify(digits[: len(digits) & ~1])
    except binascii.Error:
        return b""
