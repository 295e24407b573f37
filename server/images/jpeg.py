"""Decodes JPEG files, and refuses damaged ones.

libjpeg fills in what is missing and only warns. Pillow drops the warnings, so that half of a file
is decoded like a whole one. simplejpeg has the same library, gives the same pixels as Pillow, and
reports the first warning of a file.
"""

import re
import struct
from collections.abc import Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from server.images.formats import EncodedImage, UnreadableImage

MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # Pillow's, by the number of components
_COLOURS = {1: "GRAY", 3: "RGBX", 4: "CMYK"}  # simplejpeg's

# Bytes between the pixels of a scan and the next marker that count as padding: so many with any
# value, so many with the same one, or so many in a file with restart markers. More of them are what
# is left of damaged pixels.
MAX_STRAY_BYTES = 8
MAX_EQUAL_STRAY_BYTES = 16
MAX_STRAY_BYTES_WITH_RESTARTS = 4
# So many zero bytes are a damaged part, if they stand for coefficients: they would be two whole
# blocks of the same values. libjpeg warns of one such part in two.
ZEROED = bytes(64)
# A file with padding is decoded again without it, to see the warnings after the first one. These
# limit how often, by the pixels of all scans; a megapixel takes about 6 ms.
MAX_REPAIR_PIXELS = 512_000_000
MAX_ATTEMPTS = 40

# Up to this size, copying the pixels to three channels takes less time than resizing four channels.
MAX_COPIED_PIXELS = 1_000_000

_DAMAGE = re.compile(r"Corrupt JPEG data: |Premature end of JPEG|Inconsistent progression")
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_RESTART, _EOI, _SOS, _DHT = range(0xD0, 0xD8), 0xD9, 0xDA, 0xC4
_FRAMES = range(0xC0, 0xD0)
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
# By table, the symbol whose code has only zeros. These are of the tables that files may leave out.
_STANDARD_SYMBOLS = {0: 0x01, 1: 0x00}


def decode_jpeg(file: EncodedImage) -> Image.Image | None:
    """The image in mode "L", "RGB", "RGBX" or "CMYK"; None if simplejpeg can't decode this kind.

    Raises UnreadableImage if the file is damaged.
    """
    content, attempts, is_strict = file.content, _Attempts(file), True
    if ZEROED in content:
        _check_zeroed(content)
    while True:
        try:
            pixels = simplejpeg.decode_jpeg(content, _COLOURS[file.components], strict=is_strict)
            return _image(pixels, file.components)
        except ValueError as error:
            message = str(error)
        if stray := _STRAY.search(message):
            count, marker = int(stray[1]), int(stray[2], 16)
            ends = _ends_of_data(content)
            # Between restart markers libjpeg may name a later marker: nothing can be removed.
            if marker != _EOI and any(code in _RESTART for _, code in ends):
                repaired, is_strict = content, count > MAX_STRAY_BYTES_WITH_RESTARTS
            else:
                places = [position for position, code in ends if code == marker]
                repaired = _without_padding(content, count, places, attempts)
            if is_strict and repaired == content:
                raise UnreadableImage(
                    f"is a damaged JPEG: {count:,} extraneous bytes after the pixels"
                )
            content = repaired
        elif _DAMAGE.search(message):
            reason = message.removeprefix("Corrupt JPEG data: ")
            raise UnreadableImage(f"is a damaged JPEG: {reason}")
        else:
            return None  # an error, not a warning: Pillow may know this kind of file


def _image(pixels: NDArray[np.uint8], components: int) -> Image.Image:
    size = pixels.shape[1], pixels.shape[0]
    if components == 1:
        return Image.frombuffer("L", size, pixels, "raw", "L", 0, 1)
    if components == 4:
        return Image.frombytes("CMYK", size, pixels, "raw", "CMYK;I")  # inverted, as Adobe writes
    if size[0] * size[1] <= MAX_COPIED_PIXELS:
        return Image.frombytes("RGB", size, pixels, "raw", "RGBX")
    return Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1)


class _Attempts:
    """Limits how often one file is decoded."""

    def __init__(self, file: EncodedImage) -> None:
        width, height = file.size or (1, 1)
        self._left = min(MAX_ATTEMPTS, MAX_REPAIR_PIXELS // max(width * height * file.scans, 1))

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise UnreadableImage("is a damaged JPEG: extraneous bytes in too many places")


def _without_padding(
    content: bytes, count: int, places: Sequence[int], attempts: _Attempts
) -> bytes:
    """Removes the extraneous bytes that libjpeg found first, if they can be padding.

    They are before one of the places. If there are several, a binary search cuts the file at one of
    them: the warning comes first if the bytes are before the cut.
    """
    if count > MAX_EQUAL_STRAY_BYTES:
        return content
    while len(places) > 1:
        attempts.take()
        middle = (len(places) - 1) // 2
        is_before = _starts_with_stray(content[: places[middle]] + b"\xff\xd9")
        places = places[: middle + 1] if is_before else places[middle + 1 :]
    attempts.take()  # of the decoding that follows
    for end in places:
        while content[end - 1] == 0xFF:  # fill bytes belong to the marker
            end -= 1
        if count <= MAX_STRAY_BYTES or len(set(content[end - count : end])) == 1:
            return content[: end - count] + content[end:]
    return content


def _starts_with_stray(content: bytes) -> bool:
    """Whether the first warning is about extraneous bytes."""
    try:
        simplejpeg.decode_jpeg(content, "GRAY", True, True, 1, 1)  # at an eighth of the size
    except ValueError as error:
        return _STRAY.search(str(error)) is not None
    return False


def _ends_of_data(content: bytes) -> list[tuple[int, int]]:
    """Each marker that ends entropy-coded data: position and code."""
    ends: list[tuple[int, int]] = []
    position, is_data = 2, False
    while found := _MARKER.search(content, position):
        code = content[found.start() + 1]
        if is_data:
            ends.append((found.start(), code))
        if code == _EOI:
            break
        position = found.end()
        if code not in _RESTART:
            position += int.from_bytes(content[position : position + 2], "big")
            is_data = code == _SOS
    return ends


def _check_zeroed(content: bytes) -> None:
    try:
        is_zeroed = _is_zeroed(content)
    except (IndexError, struct.error):
        return  # libjpeg refuses damaged segments
    if is_zeroed:
        raise UnreadableImage("is a damaged JPEG: a part of the pixels is zeroed")


def _is_zeroed(content: bytes) -> bool:
    """Whether a scan has many zero bytes that stand for coefficients, not for their absence."""
    symbols, is_huffman = dict(_STANDARD_SYMBOLS), True
    position = 2
    while found := _MARKER.search(content, position):
        code, start = content[found.start() + 1], found.end() + 2
        if code == _EOI:
            break
        position = found.end() + int.from_bytes(content[found.end() : start], "big")
        segment = content[start:position]
        if code == _DHT:
            symbols |= _zero_symbols(segment)
        elif code in _FRAMES:
            is_huffman = code in _HUFFMAN_FRAMES
        elif code == _SOS:
            end_of_scan = _END_OF_SCAN.search(content, position)
            end = end_of_scan.start() if end_of_scan else len(content)
            count = segment[0]
            tables = [byte & 15 for byte in segment[2 : 2 + 2 * count : 2]]
            _, last, bits = struct.unpack_from("BBB", segment, 1 + 2 * count)
            has_coefficients = last > 0 and bits < 16  # not DC alone, not the bits that refine
            is_zeroed = content.find(ZEROED, position, end) >= 0
            if is_zeroed and is_huffman and has_coefficients:
                return any(symbols.get(table, 0) & 15 for table in tables)
            position = end
    return False


def _zero_symbols(segment: bytes) -> dict[int, int]:
    """The first symbols of the AC tables in a DHT segment: size 0 is the end of a block."""
    symbols = {}
    while len(segment) > 17:
        if segment[0] & 0xF0:
            symbols[segment[0] & 15] = segment[17]
        segment = segment[17 + sum(segment[1:17]) :]
    return symbols
