"""Resizes and crops images exactly as torchvision's evaluation transforms do with Pillow."""

import numpy as np
from PIL import Image

from server.images.input_spec import InputSpec, Pixels
from server.images.sampling import sample

# Largest resized image, in pixels, from which the crop is cut. Above it, only the cropped region is
# computed. That takes half of the time, but Pillow then changes the order of its two passes, which
# changes pixels by one level, and by up to 19 levels for noise with bicubic interpolation.
MAX_WHOLE_RESIZE = 16 << 20

# Memory for each pixel of the result without smoothing, measured.
SAMPLED_BYTES = 44

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resizes an image in mode "L", "RGB" or "RGBX" to the model's height and width."""
    if spec.letterbox:
        return _letterbox(image, spec)
    if not spec.resize:
        return _resize(image, (spec.width, spec.height), spec)
    resized = _resized_size(image.width, image.height, spec)
    left, top = _crop_start(resized[0], spec.width), _crop_start(resized[1], spec.height)
    right, bottom = left + spec.width, top + spec.height
    if resized[0] * resized[1] <= MAX_WHOLE_RESIZE and not _is_sampled(spec):
        return _resize(image, resized, spec).crop((left, top, right, bottom))
    # Compute only the crop: the whole of a resized 1 x 50,000 image would take gigabytes.
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(right, resized[0]), min(bottom, resized[1])
    if _is_sampled(spec):
        pixels = sample(_samples(image), resized, (x0, y0, x1, y1), spec.interpolation)
        part = Image.fromarray(pixels)
    else:
        across, down = image.width / resized[0], image.height / resized[1]
        box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
        part = image.resize((x1 - x0, y1 - y0), RESAMPLING[spec.interpolation], box)
    return part.crop((left - x0, top - y0, right - x0, bottom - y0))  # adds zeros outside


def fit_bytes(width: int, height: int, spec: InputSpec) -> int:
    """Memory that `fit` takes, at most: 4 bytes a pixel after each of its two passes."""
    resized = spec.width, spec.height
    if spec.resize and not _is_sampled(spec):
        resized = _resized_size(width, height, spec)
        if resized[0] * resized[1] > MAX_WHOLE_RESIZE:
            resized = spec.width, spec.height
    elif spec.letterbox:
        resized = _letterbox_size(width, height, spec)
    tables = 16 * (width + height + sum(resized))
    if _is_sampled(spec):  # two copies of the image, and numbers of 32 bits for each result
        copies = (8 if spec.channels == 3 else 2) * width * height
        return copies + SAMPLED_BYTES * spec.width * spec.height + tables
    between = resized[0] * height
    return 4 * (between + resized[0] * resized[1] + spec.width * spec.height) + tables


def array(image: Image.Image) -> Pixels:
    """[H, W, C] of an image; may be read-only."""
    pixels: Pixels = np.asarray(image)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _letterbox(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Scales the whole image to fit inside, and centres it on the fill colour."""
    resized = _letterbox_size(image.width, image.height, spec)
    fill = spec.fill if len(spec.fill) == 3 else spec.fill * 3
    colour = {"L": fill[:1], "RGB": fill, "RGBX": (*fill, 255)}[image.mode]
    canvas = Image.new(image.mode, (spec.width, spec.height), colour)
    start = (spec.width - resized[0]) // 2, (spec.height - resized[1]) // 2
    canvas.paste(_resize(image, resized, spec), start)
    return canvas


def _resize(image: Image.Image, size: tuple[int, int], spec: InputSpec) -> Image.Image:
    """The whole image, width and height set to `size`."""
    if not _is_sampled(spec):
        return image.resize(size, RESAMPLING[spec.interpolation])
    return Image.fromarray(sample(_samples(image), size, (0, 0, *size), spec.interpolation))


def _is_sampled(spec: InputSpec) -> bool:
    """Whether pixels are interpolated without smoothing. Pillow's "nearest" never smooths."""
    return not spec.antialias and spec.interpolation != "nearest"


def _samples(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image)
    return pixels[:, :, :3] if pixels.ndim == 3 else pixels  # without the X of RGBX


def _resized_size(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """Width and height after the shorter side becomes `spec.resize`."""
    long_side = int(spec.resize * max(width, height) / min(width, height))
    return (spec.resize, long_side) if width <= height else (long_side, spec.resize)


def _letterbox_size(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """The largest width and height with the image's aspect ratio that fit inside."""
    scale = min(spec.width / width, spec.height / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _crop_start(resized: int, wanted: int) -> int:
    """First pixel of torchvision's centre crop; negative if the crop starts with padding."""
    return int(round((resized - wanted) / 2.0)) if resized > wanted else -((wanted - resized) // 2)
