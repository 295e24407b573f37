"""Interpolates pixels without smoothing, as torchvision does for tensors with antialias=False.

A pixel of the result depends on the 2 x 2 or 4 x 4 pixels next to its position, however much
smaller the image gets. Keras, TensorFlow and OpenCV resize so too. The numbers are those of
torch.nn.functional.interpolate with align_corners=False, rounded to whole levels.
"""

import numpy as np
from numpy.typing import NDArray

from server.images.input_spec import Pixels

CUBIC = -0.75  # the parameter of the cubic kernel; antialiased kernels have -0.5

Weights = NDArray[np.float32]


def sample(
    pixels: Pixels, size: tuple[int, int], box: tuple[int, int, int, int], interpolation: str
) -> Pixels:
    """The part `box` (left, top, right, bottom) of [h, w] or [h, w, C] resized to `size` (w, h).

    `interpolation` is "bilinear" or "bicubic".
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    rows, row_weights = _taps(top, bottom, size[1], height, interpolation)
    columns, column_weights = _taps(left, right, size[0], width, interpolation)
    total = np.zeros((bottom - top, right - left, *pixels.shape[2:]), np.float32)
    trailing = (1,) * (pixels.ndim - 2)
    for row, row_weight in zip(rows, row_weights, strict=True):
        line = np.zeros_like(total)
        for column, weight in zip(columns, column_weights, strict=True):
            line += pixels[np.ix_(row, column)] * weight.reshape(1, -1, *trailing)
        total += line * row_weight.reshape(-1, 1, *trailing)
    np.rint(total, out=total)
    return total.clip(0, 255, out=total).astype(np.uint8)


def _taps(
    first: int, end: int, resized: int, source: int, interpolation: str
) -> tuple[NDArray[np.intp], Weights]:
    """For the results from `first` up to `end`: which sources they depend on, and how much.

    Both are [taps, results].
    """
    centres = (np.arange(first, end) + 0.5) * (source / resized) - 0.5
    if interpolation == "bilinear":
        centres = np.maximum(centres, 0)
    lowest = np.floor(centres)
    t = centres - lowest
    if interpolation == "bilinear":
        offsets = np.arange(2)
        weights = np.stack([1 - t, t])
    else:
        offsets = np.arange(-1, 3)
        weights = np.stack([_far(1 + t), _near(t), _near(1 - t), _far(2 - t)])
    taps = (lowest + offsets[:, np.newaxis]).clip(0, source - 1)
    return taps.astype(np.intp), weights.astype(np.float32)


def _near(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic kernel at distances up to 1."""
    return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1


def _far(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic kernel at distances from 1 to 2."""
    return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
