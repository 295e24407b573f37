"""Resizes and crops images exactly as torchvision's evaluation transforms do with Pillow."""

import numpy as np
from PIL import Image

from server.images.input_spec import InputSpec, Pixels

# Largest resized image, in pixels, from which the crop is cut. Above it, only the cropped region is
# computed. That takes half of the time, but Pillow then changes the order of its two passes, which
# changes pixels by one level, and by up to 19 levels for noise with bicubic interpolation.
MAX_WHOLE_RESIZE = 16 << 20

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    """Resizes and crops to the model's height and width."""
    method = RESAMPLING[spec.interpolation]
    if not spec.resize:
        return image.resize((spec.width, spec.height), method)
    resized = _resized_size(image.width, image.height, spec)
    left, top = _crop_start(resized[0], spec.width), _crop_start(resized[1], spec.height)
    right, bottom = left + spec.width, top + spec.height
    if resized[0] * resized[1] <= MAX_WHOLE_RESIZE:
        return image.resize(resized, method).crop((left, top, right, bottom))
    # Compute only the crop: the whole of a resized 1 x 50,000 image would take gigabytes.
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(right, resized[0]), min(bottom, resized[1])
    across, down = image.width / resized[0], image.height / resized[1]
    box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
    part = image.resize((x1 - x0, y1 - y0), method, box)
    return part.crop((left - x0, top - y0, right - x0, bottom - y0))  # adds zeros outside


def fit_bytes(width: int, height: int, spec: InputSpec) -> int:
    """Memory that `fit` takes, at most: 4 bytes a pixel after each of its two passes."""
    resized = spec.width, spec.height
    if spec.resize:
        resized = _resized_size(width, height, spec)
        if resized[0] * resized[1] > MAX_WHOLE_RESIZE:
            resized = spec.width, spec.height
    tables = 16 * (width + height + sum(resized))
    return 4 * (resized[0] * height + resized[0] * resized[1] + spec.width * spec.height) + tables


def array(image: Image.Image) -> Pixels:
    """[H, W, C] of an image; may be read-only."""
    pixels: Pixels = np.asarray(image)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _resized_size(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """Width and height after the shorter side becomes `spec.resize`."""
    long_side = int(spec.resize * max(width, height) / min(width, height))
    return (spec.resize, long_side) if width <= height else (long_side, spec.resize)


def _crop_start(resized: int, wanted: int) -> int:
    """First pixel of torchvision's centre crop; negative if the crop starts with padding."""
    return int(round((resized - wanted) / 2.0)) if resized > wanted else -((wanted - resized) // 2)
