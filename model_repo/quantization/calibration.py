"""The images that an INT8 engine is calibrated with, and those that it is checked with.

The ranges of the 8-bit numbers come from the images, so they must look like those of the callers.
Images are decoded as in the server. An image is used for one of the two purposes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from model_repo.evaluation.dataset import IMAGE_ENDINGS, decoded_file, files_below
from server.images.decode import from_pixels
from server.images.input_spec import InputSpec, Pixels
from server.process.cores import available_cores

MAX_CALIBRATION = 300  # images; NNCF's own default
MIN_CALIBRATION = 32  # images; with fewer the user is warned
CHECKED = 500  # images or crops that the engine is checked with
MAX_READ = 2_000  # files; more do not make the ranges better
CROP = 0.6, 0.9  # sides of a crop, as fractions of the image
SEED = 0


class CalibrationError(Exception):
    """The images can't be used. The message says why and what to do."""


class CalibrationImages(NamedTuple):
    """Images of the model's size."""

    folder: Path
    calibration: Pixels  # [N, H, W, C]
    check: Pixels  # [M, H, W, C], none of the calibration images
    checked_files: int  # files that the check images come from
    unreadable: tuple[str, ...]


def read_calibration(folder: Path, spec: InputSpec) -> CalibrationImages:
    """Reads the images below a folder, in any order of subfolders. Raises CalibrationError."""
    if not folder.is_dir():
        raise CalibrationError(
            f"--calibration {folder} is not a folder; give one with images like those of your "
            "callers, without labels"
        )
    files = [each for each in files_below(folder) if each.suffix.lower() in IMAGE_ENDINGS]
    rng = np.random.default_rng(SEED)
    chosen = [files[index] for index in rng.permutation(len(files))[:MAX_READ]]
    with ThreadPoolExecutor(available_cores(), "decode") as threads:
        decoded = list(threads.map(lambda path: decoded_file(path, spec), chosen))
    unreadable = tuple(each for each in decoded if isinstance(each, str))
    usable = [
        (path, made)
        for path, made in zip(chosen, decoded, strict=True)
        if not isinstance(made, str)
    ]
    if len(usable) < 2:
        raise CalibrationError(
            f"--calibration {folder} has {len(usable)} images that can be read; at least 2 are "
            f"needed, and about {MAX_CALIBRATION} are recommended"
        )
    # At most half of the images calibrate, so that the check sees as many that it does not know.
    split = min(MAX_CALIBRATION, (len(usable) + 1) // 2)
    calibrating, rest = usable[:split], usable[split:]
    check = [made for _, made in rest][:CHECKED]
    check += _crops([path for path, _ in rest], spec, CHECKED - len(check), rng)
    return CalibrationImages(
        folder,
        np.stack([made for _, made in calibrating]),
        np.stack(check),
        len(rest),
        unreadable,
    )


def _crops(
    paths: Sequence[Path], spec: InputSpec, count: int, rng: np.random.Generator
) -> list[Pixels]:
    """Random parts of the images, each as if it were an image of its own."""
    made: list[Pixels] = []
    images: dict[Path, Pixels] = {}
    for number in range(max(0, count)):
        path = paths[number % len(paths)]
        if path not in images:
            with Image.open(path) as image:
                images[path] = np.asarray(image.convert("RGB"))
        pixels = images[path]
        height, width = (max(1, round(side * rng.uniform(*CROP))) for side in pixels.shape[:2])
        top, left = (
            int(rng.integers(0, side - part + 1))
            for side, part in zip(pixels.shape[:2], (height, width), strict=True)
        )
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        made.append(from_pixels(part.tobytes(), height, width, 3, spec))
    return made
