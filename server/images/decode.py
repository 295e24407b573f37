"""Converts JPEG, PNG, WebP, BMP and GIF files, and raw pixels, to uint8 [H, W, C] for a model.

The functions have no shared state; any number of threads may call them.

- Resizing and cropping give exactly the result of torchvision's evaluation transforms on a Pillow
  image.
- Transparent pixels are blended with white. The colour that a file stores below them is often
  arbitrary. If no pixel is visible, the transparency is ignored: it carries no information.
- 16-bit samples are reduced to their upper 8 bits. Grey is ITU-R 601 luma. Colour profiles are
  ignored.
- The orientation in Exif or XMP metadata is applied.
"""

import warnings
from contextlib import AbstractContextManager, ExitStack
from io import BytesIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from server.errors import InvalidInput
from server.images.decoding_cost import Header, decoding_bytes, raw_bytes
from server.images.formats import EncodedImage, UnreadableImage, first_image
from server.images.input_spec import DEFAULT_LIMITS, ImageLimits, InputSpec, Pixels
from server.images.jpeg import MODES, decode_jpeg
from server.images.memory import MemoryNeeded
from server.images.resize import array, fit

# Import the plugins now. Otherwise the first request makes Pillow search for them.
PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
Image.preinit()

# Pillow rejects decompression bombs above twice its limit, and only warns from the limit on.
# Reject both.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

ALLOWED = "a JPEG, PNG, WebP, BMP or GIF file"
# Limit for run-length encoded BMPs, for pixels and for bytes: Pillow decodes them in Python and
# needs up to 0.8 s a MiB.
MAX_RLE_BYTES = 1 << 20
# Least and greatest alpha of an image without a visible pixel. Many programs write BMP files so:
# they reserve the alpha channel and do not use it.
NOTHING_VISIBLE = (0, 0)

UPRIGHT = {  # the operation that undoes each Exif orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    encoded: bytes,
    spec: InputSpec,
    limits: ImageLimits = DEFAULT_LIMITS,
    field: str = "images[0].encoded",
) -> Pixels:
    """Decodes an image file to [H, W, C]; the array is C-contiguous and may be read-only.

    Raises InvalidInput for every fault of the file, and MemoryNeeded if `limits.memory` has too
    little free.
    """
    if not encoded:
        raise InvalidInput(field, f"is empty; {ALLOWED} is needed")
    if len(encoded) > limits.encoded_bytes:
        raise InvalidInput(
            field, f"has {len(encoded):,} bytes; at most {limits.encoded_bytes:,} are allowed"
        )
    needed, reason = 0, ""
    with ExitStack() as memory:
        try:
            return _decoded(encoded, spec, limits, memory)
        except MemoryNeeded as error:
            needed = error.needed
        except UnreadableImage as error:
            reason = str(error)
    # Raise new errors: the tracebacks of the caught ones keep copies of the image in memory.
    if needed:
        raise MemoryNeeded(needed)
    given = f"the file of {len(encoded):,} bytes {reason}"
    raise InvalidInput(field, f"{given}; {ALLOWED} is needed")


def from_pixels(
    data: bytes,
    height: int,
    width: int,
    channels: int,
    spec: InputSpec,
    limits: ImageLimits = DEFAULT_LIMITS,
    field: str = "images[0].raw",
) -> Pixels:
    """Converts one raw image to [H, W, C]; a read-only view of `data` if it has this shape.

    Raises InvalidInput.
    """
    _check_raw(len(data), None, (height, width, channels), limits, field)
    pixels = np.frombuffer(data, np.uint8).reshape(1, height, width, channels)
    return _fit_raw(pixels, spec, limits).reshape(spec.shape)


def batch_from_pixels(
    data: bytes | memoryview,
    count: int,
    height: int,
    width: int,
    channels: int,
    spec: InputSpec,
    limits: ImageLimits = DEFAULT_LIMITS,
    field: str = "pixels",
) -> Pixels:
    """Converts raw images of one size to [count, H, W, C].

    The result is a read-only view of `data` if it has this shape. The caller limits `count`.
    Raises InvalidInput.
    """
    _check_raw(len(data), count, (height, width, channels), limits, field)
    row_bytes = spec.height * spec.width * spec.channels
    if (height, width, channels) != spec.shape and count * row_bytes > limits.resized_bytes:
        raise InvalidInput(
            f"{field}.count",
            f"{count:,} images would take {count * row_bytes:,} bytes after resizing; "
            f"at most {limits.resized_bytes:,} are allowed",
        )
    pixels = np.frombuffer(data, np.uint8).reshape(count, height, width, channels)
    return _fit_raw(pixels, spec, limits)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise UnreadableImage(
            f"has a header with {width} x {height} pixels; both must be at least 1"
        )
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise UnreadableImage(
            f"has {width:,} x {height:,} pixels; at most {limits.pixels:,} in total "
            f"and {limits.side:,} a side are allowed"
        )


def _decoded(encoded: bytes, spec: InputSpec, limits: ImageLimits, memory: ExitStack) -> Pixels:
    image = fit(_load(first_image(encoded), spec, limits, memory), spec)
    return array(image.convert("RGB") if image.mode == "RGBX" else image)


def _load(
    file: EncodedImage, spec: InputSpec, limits: ImageLimits, memory: ExitStack
) -> Image.Image:
    """Decodes the whole image, upright, in mode "L", "RGB" or "RGBX", and reserves memory for that.

    Raises UnreadableImage and MemoryNeeded.
    """
    if file.size:
        _check_size(*file.size, limits)
    plain = None
    if file.size and file.components in MODES:
        header = Header(MODES[file.components], *file.size)
        memory.enter_context(_reserved(header, file, spec, limits))
        plain = decode_jpeg(file)
        if plain is None:
            memory.close()
        elif plain.mode[:3] != (mode := "RGB" if spec.channels == 3 else "L"):
            plain = plain.convert(mode)
    if plain is None:
        plain = _load_with_pillow(file, spec, limits, memory)
    return plain.transpose(UPRIGHT[file.orientation]) if file.orientation in UPRIGHT else plain


def _load_with_pillow(
    file: EncodedImage, spec: InputSpec, limits: ImageLimits, memory: ExitStack
) -> Image.Image:
    """Decodes the whole image as it is stored, in mode "L" or "RGB"."""
    name = file.format
    try:
        with Image.open(BytesIO(file.content), formats=[name]) as image:
            _check_size(*image.size, limits)
            codec = image.tile[0] if image.tile else None  # a WebP image has no tile before load()
            if codec and codec.codec_name == "bmp_rle":
                _check_run_length(len(file.content), image)
            header = Header(image.mode, *image.size, image.has_transparency_data)
            memory.enter_context(_reserved(header, file, spec, limits))
            image.load()
            if codec and codec.args == "RGB;16B" and "transparency" in image.info:
                # Pillow reduces the pixels to 8 bits, but not the transparent colour.
                image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
            return _blend_with_white(image, spec.channels)
    except (UnreadableImage, MemoryNeeded, MemoryError):
        raise  # lack of memory is the server's fault, not the client's
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"is a {name} of more than {limits.pixels:,} pixels") from None
    except UnidentifiedImageError:  # Pillow's message holds only the address of an object
        raise UnreadableImage(f"is a {name} with a damaged header") from None
    except Exception as error:  # Pillow has no common exception for damaged files
        reason = str(error)[:200] or type(error).__name__
        raise UnreadableImage(f"is a {name} that can't be decoded: {reason}") from error


def _reserved(
    image: Header, file: EncodedImage, spec: InputSpec, limits: ImageLimits
) -> AbstractContextManager[None]:
    """Holds the memory that decoding takes. Raises UnreadableImage if it can never be free."""
    needed = decoding_bytes(image, file, spec)
    if needed > limits.memory.limit_bytes:
        raise UnreadableImage(
            f"is a {file.format} of {image.width:,} x {image.height:,} pixels, which takes "
            f"{needed:,} bytes of memory to decode; at most {limits.memory.limit_bytes:,} "
            "are allowed"
        )
    return limits.memory.hold(needed)


def _check_run_length(file_bytes: int, image: Image.Image) -> None:
    if max(file_bytes, image.width * image.height) > MAX_RLE_BYTES:
        raise UnreadableImage(
            f"is a run-length encoded BMP of {image.width:,} x {image.height:,} pixels; "
            f"at most {MAX_RLE_BYTES:,} pixels and bytes are allowed"
        )


def _blend_with_white(image: ImageFile.ImageFile, channels: int) -> Image.Image:
    """Converts to mode "L" or "RGB"; transparent pixels are blended with white."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would clip at 255
        wide = np.asarray(image)
        grey = (wide >> 8).astype(np.uint8)
        is_transparent = wide == image.info.get("transparency", -1)
        if not is_transparent.all():
            grey[is_transparent] = 255
        return Image.fromarray(grey).convert(mode)
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    layered = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    alpha = layered.getchannel("A")
    if alpha.getextrema() in ((255, 255), NOTHING_VISIBLE):
        return layered.convert(mode)
    white = Image.new("RGB", layered.size, "white")
    white.paste(layered, mask=alpha)
    return white if mode == "RGB" else white.convert(mode)


def _check_raw(
    given: int,
    count: int | None,
    shape: tuple[int, int, int],
    limits: ImageLimits,
    field: str,
) -> None:
    height, width, channels = shape
    for name, side in (("height", height), ("width", width)):
        if not 1 <= side <= limits.side:
            raise InvalidInput(f"{field}.{name}", f"is {side:,}; 1 to {limits.side:,} is allowed")
    if height * width > limits.pixels:
        raise InvalidInput(
            f"{field}.height",
            f"{height:,} x {width:,} pixels are given; at most {limits.pixels:,} are allowed",
        )
    if channels not in (1, 3):
        raise InvalidInput(f"{field}.channels", f"is {channels:,}; 1 (grey) or 3 (RGB) is allowed")
    images = ""
    if count is not None:
        if count < 1:
            raise InvalidInput(f"{field}.count", f"is {count:,}; at least 1 is needed")
        images = f"{count:,} x "
    expected = (1 if count is None else count) * height * width * channels
    if given != expected:
        raise InvalidInput(
            f"{field}.data",
            f"has {given:,} bytes; {images}{height} x {width} x {channels} needs {expected:,}",
        )


def _fit_raw(pixels: Pixels, spec: InputSpec, limits: ImageLimits) -> Pixels:
    """Resizes [N, h, w, c] to the model's [N, H, W, C]. Raises MemoryNeeded."""
    if pixels.shape[1:] == spec.shape:
        return pixels
    count, height, width, channels = pixels.shape
    needed = raw_bytes(count, height, width, channels, spec)
    with limits.memory.hold(int(min(needed, limits.memory.limit_bytes))):
        return _resized_raw(pixels, spec)


def _resized_raw(pixels: Pixels, spec: InputSpec) -> Pixels:
    count, height, width, channels = pixels.shape
    if channels == 3 and spec.channels == 1:  # convert the batch as one tall image
        grey = Image.fromarray(pixels.reshape(-1, width, 3)).convert("L")
        pixels = np.asarray(grey).reshape(count, height, width, 1)
    if channels < spec.channels and len(spec.fill) > 1:  # grey pixels beside a coloured fill
        pixels = np.repeat(pixels, spec.channels, axis=3)
    if (height, width) != (spec.height, spec.width):
        fitted = np.empty((count, spec.height, spec.width, pixels.shape[3]), np.uint8)
        for row, image in zip(fitted, pixels, strict=True):
            plane = image.squeeze(2) if image.shape[2] == 1 else image
            row[...] = array(fit(Image.fromarray(plane), spec))
        pixels = fitted
    if pixels.shape[3] < spec.channels:
        pixels = np.repeat(pixels, spec.channels, axis=3)
    return pixels
