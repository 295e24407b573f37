"""Estimates the memory that decoding takes, from an image's header.

The numbers are bytes a pixel, measured as the peak of the resident memory; a test measures them
again. Most of them are copies in Pillow, which stores one byte for a sample of grey or a palette
index, and four for everything else.
"""

from typing import NamedTuple

from server.images.formats import EncodedImage
from server.images.input_spec import InputSpec
from server.images.resize import fit_bytes

ONE_BYTE = frozenset({"1", "L", "P"})
WEBP_CANVASES = 8  # of libwebp, the current and the previous one; they live as long as the image
WEBP_COPY = 4  # of the current canvas, until the pixels are loaded
FILE_COPIES = {"JPEG": 1, "PNG": 1, "GIF": 1, "WEBP": 2, "BMP": 0}
SIXTEEN_BITS = 8  # a copy of the samples, their upper halves, grey, a mask


class Header(NamedTuple):
    """What the header of a file says about its pixels."""

    mode: str  # Pillow's
    width: int
    height: int
    has_transparency: bool = False


def decoding_bytes(image: Header, file: EncodedImage, spec: InputSpec) -> int:
    """Peak memory of decoding a file."""
    pixels = image.width * image.height
    colour = 4 if spec.channels == 3 else 1
    loaded = 1 if image.mode in ONE_BYTE else 4
    loading = loaded
    if file.format == "WEBP":
        loaded += WEBP_CANVASES
        loading = loaded + WEBP_COPY
    converted = _conversion(image, colour)
    turned = 0
    if file.orientation > 1:
        turned = colour + (colour if converted else loaded)
    peak = max(loading, loaded + converted, turned)
    decoded = max(loading * pixels + file.coefficient_bytes, peak * pixels)
    copies = FILE_COPIES[file.format] * len(file.content)
    return decoded + copies + fit_bytes(image.width, image.height, spec)


def _conversion(image: Header, colour: int) -> int:
    """Bytes a pixel to make grey or RGB from the loaded image."""
    if image.mode.startswith("I"):
        return SIXTEEN_BITS
    if image.has_transparency:
        layered = 0 if image.mode in ("RGBA", "LA") else 4
        alpha, white, grey = 1, 4, 1 if colour == 1 else 0
        return layered + alpha + white + grey
    if image.mode == ("RGB" if colour == 4 else "L"):
        return 0
    rgb = 4 if image.mode == "CMYK" and colour == 1 else 0  # on the way to grey
    return rgb + colour


def raw_bytes(count: int, height: int, width: int, channels: int, spec: InputSpec) -> int:
    """Peak memory of resizing raw images, without the result."""
    image = 4 * height * width + fit_bytes(width, height, spec)  # one at a time
    grey = 6 * count * height * width if channels > spec.channels else 0  # all at once
    return image + grey
