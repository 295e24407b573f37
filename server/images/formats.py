"""Extracts the first image of a file and drops everything else.

Comments, thumbnails, colour profiles, XMP, further frames and trailing bytes do not change the
image, but decoders can hang on them: Pillow joins Exif segments in quadratic time, copies every
Exif tag even if tags overlap, and inflates every text chunk. This module removes them in one pass
over the file, in bounded time. Of the metadata it reads only the orientation, Exif or XMP.
"""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from server.images.orientation import (
    EXIF_HEADER,
    PNG_METADATA,
    PNG_TEXT,
    XMP_HEADER,
    exif_orientation,
    png_orientation,
    xmp_orientation,
)

MAX_PARTS = 16_384  # segments, chunks or blocks; a 20 MiB PNG with 8 KiB chunks has 2,560
MAX_JPEG_SCANS = 64  # progressive encoders write about 10
MAX_JPEG_SCAN_PIXELS = 512_000_000  # even an empty scan takes 6 ms a megapixel
MAX_JPEG_TABLE_BYTES = 256 << 10  # quantisation and Huffman tables; most files have 1 to 4 KiB


class UnreadableImage(Exception):
    """The reason why a file can't be used; the text continues "the file ..."."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file that holds one image, without metadata."""

    format: str  # Pillow's name
    content: bytes
    size: tuple[int, int] | None = None  # width, height in the header; None: only Pillow knows
    orientation: int = 0  # 1 to 8 as in Exif; 0: not given
    components: int = 0  # of a JPEG: 1 grey, 3 colour, 4 CMYK
    scans: int = 0  # of a JPEG
    coefficient_bytes: int = 0  # what a JPEG decoder stores if the image has more than one scan


def first_image(encoded: bytes) -> EncodedImage:
    """The first image of a JPEG, PNG, WebP, BMP or GIF file. Raises UnreadableImage."""
    for name, signature, extract in _FORMATS:
        if signature.match(encoded):
            try:
                return extract(encoded)
            except (struct.error, IndexError):
                raise UnreadableImage(f"is a truncated {name}") from None
    raise UnreadableImage(f"{_description(encoded)}, which is not a supported format")


def _description(encoded: bytes) -> str:
    """What the file seems to be. Never a part of it: errors must not show what callers send."""
    for signature, description in _OTHER_FILES:
        if signature.match(encoded):
            return f"is {description}"
    return "has an unknown signature"


# Files that are sent by mistake.
_OTHER_FILES = tuple(
    (re.compile(signature, re.DOTALL), description)
    for signature, description in (
        (rb"II\*\0|MM\0\*", "a TIFF file"),
        (rb"....ftyp(heic|heix|mif1|msf1)", "a HEIC file"),
        (rb"....ftypavi[fs]", "an AVIF file"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL file"),
        (rb"%PDF", "a PDF file"),
        (rb"PK\x03\x04", "a ZIP archive"),
        (rb"\x1f\x8b", "a gzip file"),
        (rb"\s{0,64}<", "an HTML, XML or SVG text"),
        (rb"\s{0,64}[{\[]", "a JSON text"),
        (rb"data:|/9j/|iVBORw0KGgo|R0lGOD|UklGR", "an image as base64 text"),
    )
)


# A marker that starts a segment. Excludes the escape FF 00, fill bytes and restart markers.
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # without DHT, JPG, DAC
_SEQUENTIAL = (b"\xc0", b"\xc1", b"\xc9")
_PROGRESSIVE = (0xC2, 0xCA)


def _jpeg(encoded: bytes) -> EncodedImage:
    view = memoryview(encoded)
    kept = [view[:2]]
    exif = xmp = None
    frame = b""
    scans = table_bytes = 0
    position = 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(encoded, position)
        if found is None:
            if not scans:
                raise UnreadableImage("is a JPEG that ends before its first scan")
            break  # the decoder refuses a file without end marker
        start, marker = found.start(), encoded[found.start() + 1]
        position = start + 2
        if marker == _EOI:
            kept.append(view[start:position])
            break
        if marker == _SOI:
            continue
        (length,) = struct.unpack_from(">H", encoded, position)
        position += max(length, 2)
        if marker == _SOS:
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise UnreadableImage(f"is a JPEG with more than {MAX_JPEG_SCANS} scans")
            following = _JPEG_MARKER.search(encoded, position)
            position = following.start() if following else len(encoded)
            kept.append(view[start:position])
        elif marker == _APP1:
            if exif is None and encoded.startswith(EXIF_HEADER, start + 4):
                exif = exif_orientation(encoded[start + 4 : position])
            elif xmp is None and encoded.startswith(XMP_HEADER, start + 4):
                xmp = xmp_orientation(encoded[start + 4 : position])
        elif marker in (_APP0, _APP14) or not (_APP0 <= marker <= _APP15 or marker == _COM):
            # Keep the JFIF and Adobe segments (APP0, APP14): they define the colour space.
            table_bytes += length
            if table_bytes > MAX_JPEG_TABLE_BYTES:
                raise UnreadableImage(
                    f"is a JPEG with more than {MAX_JPEG_TABLE_BYTES:,} bytes of tables"
                )
            if marker in _SOF and not scans:
                frame = encoded[start:position]
            kept.append(view[start:position])
    else:
        raise UnreadableImage(f"is a JPEG with more than {MAX_PARTS:,} segments")
    return _jpeg_image(kept, frame, exif or xmp or 0)


def _jpeg_image(parts: Sequence[memoryview], frame: bytes, orientation: int) -> EncodedImage:
    """The image of these segments; `frame` is the one that describes the pixels."""
    scans = [part for part in parts if part[1] == _SOS]
    size = None
    if frame:
        height, width = struct.unpack_from(">HH", frame, 5)
        size = width, height
        if len(scans) > 1 and len(scans) * width * height > MAX_JPEG_SCAN_PIXELS:
            raise UnreadableImage(
                f"is a JPEG of {len(scans)} scans of {width:,} x {height:,} pixels; "
                f"at most {MAX_JPEG_SCAN_PIXELS:,} in all scans are allowed"
            )
        _check_scans(frame, scans)
    return EncodedImage(
        "JPEG",
        b"".join(_with_known_values(part, frame) for part in parts),
        size,
        orientation,
        components=frame[9] if frame else 0,
        scans=len(scans),
        coefficient_bytes=_coefficient_bytes(frame, len(scans)),
    )


def _check_scans(frame: bytes, scans: Sequence[memoryview]) -> None:
    """Raises UnreadableImage if the scans do not bring every coefficient with all its bits.

    libjpeg does not warn of that. A progressive file that was cut between two scans looks blurred.
    """
    missing = {frame[at]: bytearray(b"\xff" * 64) for at in range(10, len(frame) - 2, 3)}
    for scan in scans:
        count = scan[4]
        first, last, bits = 0, 63, 0
        if frame[1] in _PROGRESSIVE:
            first, last, bits = struct.unpack_from("BBB", scan, 5 + 2 * count)
            last, bits = min(last, 63), bits & 15
        for component in scan[5 : 5 + 2 * count : 2]:
            if component in missing and first <= last:
                missing[component][first : last + 1] = bytes([bits]) * (last + 1 - first)
    if any(map(any, missing.values())):
        raise UnreadableImage("is a damaged JPEG: scans are missing")


def _with_known_values(part: memoryview, frame: bytes) -> bytes | memoryview:
    """Replaces harmless values that libjpeg warns of, by the values that it assumes for them.

    It reports only the first warning, and later ones can be serious.
    """
    marker, name, at, known = part[1], bytes(part[4:9]), 0, b""
    if marker == _APP0 and name == b"JFIF\0":
        at, known = 9, b"\1"  # major version
    elif marker == _APP14 and name == b"Adobe" and max(part[15:16], default=0) > 2:
        at, known = 15, b"\2" if frame[9:10] == b"\4" else b"\1"  # colour transform: YCCK, YCbCr
    elif marker == _SOS and frame[1:2] in _SEQUENTIAL:
        at, known = 5 + 2 * part[4], b"\0\x3f\0"  # first and last coefficient, bits
    if not known or part[at : at + len(known)] == known:
        return part
    return b"".join((part[:at], known, part[at + len(known) :]))


def _coefficient_bytes(frame: bytes, scans: int) -> int:
    """Two bytes for each sample, if the decoder must keep all of them until the last scan."""
    if scans < 2 or len(frame) < 12:  # without a component
        return 0
    height, width, components = struct.unpack_from(">HHB", frame, 5)
    if not components:
        return 0
    factors = [(byte >> 4, byte & 15) for byte in frame[11 : 10 + 3 * components : 3]]
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    samples = sum(h * v for h, v in factors) / (across * down or 1)
    return int(2 * samples * (width + 8 * across) * (height + 8 * down))


_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def _png(encoded: bytes) -> EncodedImage:
    view = memoryview(encoded)
    kept = [view[:8]]
    metadata: dict[bytes, tuple[bytes, memoryview]] = {}
    position = 8
    if encoded[12:16] != b"IHDR":
        raise UnreadableImage("is a PNG that does not start with an IHDR chunk")
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + 12 + length
        (checksum,) = struct.unpack_from(">I", encoded, end - 4)
        if crc32(view[position + 4 : end - 4]) != checksum:  # Pillow does not check IDAT
            raise UnreadableImage(f"is a PNG with a wrong checksum in its {kind!r} chunk")
        if kind in _PNG_KEPT:
            kept.append(view[position:end])
        else:
            name = kind
            if kind in PNG_TEXT:
                name = encoded[position + 8 : position + 88].partition(b"\0")[0]  # its keyword
            if name in PNG_METADATA:
                metadata.setdefault(name, (kind, view[position + 8 : end - 4]))
        if kind == b"IEND":
            break
        position = end
    else:
        raise UnreadableImage(f"is a PNG with more than {MAX_PARTS:,} chunks")
    size = struct.unpack_from(">II", encoded, 16)
    return EncodedImage("PNG", b"".join(kept), size, png_orientation(metadata))


_GIF_XMP = b"!\xff\x0bXMP DataXMP"  # an application extension


def _gif(encoded: bytes) -> EncodedImage:
    flags = encoded[10]
    position = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    kept = encoded[:position]
    control = b""
    blocks = xmp = 0
    while blocks < MAX_PARTS:
        blocks += 1
        if encoded[position] == ord(","):
            size = struct.unpack_from("<HH", encoded, 6)
            return EncodedImage("GIF", kept + control + encoded[position:], size, xmp)
        if encoded[position] == ord(";"):
            raise UnreadableImage("is a GIF without a frame")
        if encoded[position] != ord("!"):
            position += 1
            continue
        start, position = position, position + 2
        while encoded[position] and blocks < MAX_PARTS:
            position += 1 + encoded[position]
            blocks += 1
        position += 1
        if encoded[start + 1] == 0xF9:  # graphic control extension: transparency
            control = encoded[start:position]
        elif not xmp and encoded.startswith(_GIF_XMP, start):
            xmp = xmp_orientation(encoded[start + len(_GIF_XMP) : position])
    raise UnreadableImage(f"is a GIF with more than {MAX_PARTS:,} blocks before its first frame")


def _webp(encoded: bytes) -> EncodedImage:
    """Keeps the whole file, as libwebp reads it fast. Reads the size, because libwebp allocates the
    canvas before it reports one."""
    size = None
    match encoded[12:16]:
        case b"VP8X":
            width, height = encoded[24:27], encoded[27:30]
            size = int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", encoded, 21)
            size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width_bits, height_bits = struct.unpack_from("<HH", encoded, 26)
            size = width_bits & 0x3FFF, height_bits & 0x3FFF
    return EncodedImage("WEBP", encoded, size, _webp_orientation(encoded))


def _webp_orientation(encoded: bytes) -> int:
    exif = xmp = None
    position = 12
    for _ in range(MAX_PARTS):
        if position + 8 > len(encoded):
            break
        kind, length = struct.unpack_from("<4sI", encoded, position)
        start, position = position + 8, position + 8 + length + length % 2
        if kind == b"EXIF" and exif is None:
            exif = exif_orientation(encoded[start:position])
        elif kind == b"XMP " and xmp is None:
            xmp = xmp_orientation(encoded[start:position])
    return exif or xmp or 0


def _bmp(encoded: bytes) -> EncodedImage:
    return EncodedImage("BMP", encoded)


_FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[bytes], EncodedImage]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), _jpeg),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), _png),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), _webp),
    ("BMP", re.compile(rb"BM"), _bmp),
    ("GIF", re.compile(rb"GIF8[79]a"), _gif),
)
