"""JPEG, PNG, WebP, BMP, GIF or raw pixels -> uint8 [H, W, C], as the model's card says.

The functions share nothing and may be called from any number of threads.

- Resizing and cropping are those of torchvision's evaluation transforms on Pillow images, exactly.
- See-through pixels lie on white, as on a page: the colour stored under them is often garbage.
- Of 16 bits the upper 8 are taken. Grey is ITU-R 601 luma. Colour profiles are ignored.
- The Exif orientation is honoured, in JPEG, PNG and WebP.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
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
from server.images.formats import (
    Picture,
    Unreadable,
    exif_orientation,
    first_picture,
)

# Imported here, so that the first request does not make Pillow look for plugins.
PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
Image.preinit()

# Where Pillow would only warn of a decompression bomb it refuses, as it does above twice that size.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

ALLOWED = "a JPEG, PNG, WebP, BMP or GIF file"
MAX_PIXELS = 89_478_485  # where Pillow's own limit stands
# Bytes of pixels and of file. Pillow decodes run-length BMPs in Python, up to 0.8 s a MiB.
MAX_RLE_BYTES = 1 << 20
# Pixels of a resized image before its crop. Beyond, only what the crop leaves is computed, which
# costs half of the time but differs by the order of Pillow's passes: a level, 19 in bicubic noise.
MAX_WHOLE_RESIZE = 16 << 20

Pixels = NDArray[np.uint8]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

UPRIGHT = {  # what undoes each Exif orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The pixels a model wants, and how an image of another size becomes them."""

    height: int
    width: int
    channels: int  # 1 grey, 3 red-green-blue
    resize: int = 0  # the shorter side, before height x width are cut from the centre; 0: no cut
    interpolation: str = "bilinear"  # antialiased when it makes smaller, as Pillow does

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"height and width must be at least 1, not {self.height} x {self.width}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels}")
        if self.resize < 0:
            raise ValueError(f"resize must be 0 or a side in pixels, not {self.resize}")
        if self.interpolation not in RESAMPLING:
            names = ", ".join(RESAMPLING)
            raise ValueError(f"interpolation must be one of {names}, not {self.interpolation!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    def view(self, data: bytes, rows: int) -> Pixels | None:
        """[rows, H, W, C] where the bytes are raw pixels of just this shape, as they are; else
        None."""
        if len(data) != rows * self.height * self.width * self.channels:
            return None
        return np.frombuffer(data, np.uint8).reshape(rows, self.height, self.width, self.channels)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may cost."""

    encoded_bytes: int = 20 << 20  # of one file
    pixels: int = 50_000_000  # of one image, checked before it is decoded
    side: int = (
        65_535  # JPEG's own; bounds the resampling filter's table, 16 bytes a pixel of a side
    )
    resized_bytes: int = (
        256 << 20
    )  # of a raw batch once it is resized: tiny images must not grow huge

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"pixels must be at most {MAX_PIXELS:,}, not {self.pixels:,}")


DEFAULT_LIMITS = ImageLimits()


def decode(
    encoded: bytes,
    spec: InputSpec,
    limits: ImageLimits = DEFAULT_LIMITS,
    field: str = "images[0].encoded",
) -> Pixels:
    """An image file -> [H, W, C], C-contiguous, maybe read-only.

    Whatever is wrong with the file is an InvalidInput. Costs up to some 20 bytes of memory a pixel.
    """
    if not encoded:
        raise InvalidInput(field, f"is empty; {ALLOWED} is needed")
    if len(encoded) > limits.encoded_bytes:
        raise InvalidInput(
            field, f"has {len(encoded):,} bytes; at most {limits.encoded_bytes:,} are allowed"
        )
    try:
        image = _loaded(first_picture(encoded), spec.channels, limits)
    except Unreadable as error:
        given = f"the file of {len(encoded):,} bytes {error}"
        raise InvalidInput(field, f"{given}; {ALLOWED} is needed") from error
    return _array(_fit(image, spec))


def from_pixels(
    data: bytes,
    height: int,
    width: int,
    channels: int,
    spec: InputSpec,
    limits: ImageLimits = DEFAULT_LIMITS,
    field: str = "images[0].raw",
) -> Pixels:
    """Raw pixels -> [H, W, C]; a read-only view of `data` where that is their shape already.

    Raises InvalidInput.
    """
    _check_raw(len(data), None, (height, width, channels), limits, field)
    pixels = np.frombuffer(data, np.uint8).reshape(1, height, width, channels)
    return _fit_raw(pixels, spec).reshape(spec.shape)


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
    """Raw images of one size -> [count, H, W, C]; a read-only view of `data` where that is their
    shape already. How many images a call may hold is for the caller to limit. Raises InvalidInput.
    """
    _check_raw(len(data), count, (height, width, channels), limits, field)
    row_bytes = spec.height * spec.width * spec.channels
    if (height, width, channels) != spec.shape and count * row_bytes > limits.resized_bytes:
        raise InvalidInput(
            f"{field}.count",
            f"{count:,} images would take {count * row_bytes:,} bytes when resized; "
            f"at most {limits.resized_bytes:,} are allowed",
        )
    pixels = np.frombuffer(data, np.uint8).reshape(count, height, width, channels)
    return _fit_raw(pixels, spec)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise Unreadable(f"says it is {width} x {height} pixels; both must be at least 1")
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise Unreadable(
            f"says it is {width:,} x {height:,} pixels; at most {limits.pixels:,} in all "
            f"and {limits.side:,} a side are allowed"
        )


def _loaded(picture: Picture, channels: int, limits: ImageLimits) -> Image.Image:
    """The whole picture, upright, of mode "L" or "RGB". Raises Unreadable."""
    if picture.size:
        _check_size(*picture.size, limits)
    name = picture.format
    try:
        with Image.open(BytesIO(picture.file), formats=[name]) as image:
            _check_size(*image.size, limits)
            codec = image.tile[0] if image.tile else None  # WebP shows its own only when loaded
            if codec and codec.codec_name == "bmp_rle":
                _check_run_length(len(picture.file), image)
            image.load()
            if codec and codec.args == "RGB;16B" and "transparency" in image.info:
                # the transparent colour must shrink with the pixels
                image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
            orientation = picture.orientation
            if name == "WEBP":
                orientation = exif_orientation(image.info.get("exif", b""))
            plain = _plain(image, channels)
    except (Unreadable, MemoryError):
        raise  # out of memory is our trouble, not the caller's mistake
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"is a {name} of more than {limits.pixels:,} pixels") from None
    except UnidentifiedImageError:  # Pillow's words are no more than an object's address
        raise Unreadable(f"is a {name} with a damaged header") from None
    except Exception as error:  # Pillow has no exception of its own for a damaged file
        reason = str(error)[:200] or type(error).__name__
        raise Unreadable(f"is a {name} that can't be decoded: {reason}") from error
    return plain.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else plain


def _check_run_length(file_bytes: int, image: Image.Image) -> None:
    if max(file_bytes, image.width * image.height) > MAX_RLE_BYTES:
        raise Unreadable(
            f"is a run-length coded BMP of {image.width:,} x {image.height:,} pixels; "
            f"at most {MAX_RLE_BYTES:,} pixels and bytes are allowed"
        )


def _plain(image: ImageFile.ImageFile, channels: int) -> Image.Image:
    """An image of mode "L" or "RGB" that looks like `image` on a white page."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        wide = np.asarray(image)
        grey = (wide >> 8).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert(mode)
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    layered = image.convert("RGBA")
    alpha = layered.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return layered.convert(mode)
    page = Image.new("RGB", layered.size, "white")
    page.paste(layered, mask=alpha)
    return page.convert(mode)


def _fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resizes and crops to the model's height and width."""
    method = RESAMPLING[spec.interpolation]
    if not spec.resize:
        return image.resize((spec.width, spec.height), method)
    shorter, longer = sorted(image.size)
    long_side = int(spec.resize * longer / shorter)
    resized = (spec.resize, long_side) if image.width <= image.height else (long_side, spec.resize)
    left, top = _crop_begin(resized[0], spec.width), _crop_begin(resized[1], spec.height)
    right, bottom = left + spec.width, top + spec.height
    if resized[0] * resized[1] <= MAX_WHOLE_RESIZE:
        return image.resize(resized, method).crop((left, top, right, bottom))
    # Whole, an image of 1 x 50,000 would become gigabytes.
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(right, resized[0]), min(bottom, resized[1])
    across, down = image.width / resized[0], image.height / resized[1]
    box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
    part = image.resize((x1 - x0, y1 - y0), method, box)
    return part.crop((left - x0, top - y0, right - x0, bottom - y0))  # zeros where it is too small


def _crop_begin(resized: int, wanted: int) -> int:
    """Where torchvision's centre crop begins; negative: so many zeros come first."""
    return int(round((resized - wanted) / 2.0)) if resized > wanted else -((wanted - resized) // 2)


def _array(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


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


def _fit_raw(pixels: Pixels, spec: InputSpec) -> Pixels:
    """[N, h, w, c] -> [N, H, W, C]."""
    count, height, width, channels = pixels.shape
    if channels == 3 and spec.channels == 1:  # stacked, a batch is one tall image
        grey = Image.fromarray(pixels.reshape(-1, width, 3)).convert("L")
        pixels = np.asarray(grey).reshape(count, height, width, 1)
    if (height, width) != (spec.height, spec.width):
        fitted = np.empty((count, spec.height, spec.width, pixels.shape[3]), np.uint8)
        for row, image in zip(fitted, pixels, strict=True):
            row[...] = _array(
                _fit(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), spec)
            )
        pixels = fitted
    if pixels.shape[3] < spec.channels:
        pixels = np.repeat(pixels, spec.channels, axis=3)
    return pixels
