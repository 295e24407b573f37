"""Images to send, as files or pixels: synthetic, from scikit-learn, or from a folder."""

import gzip
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, Any]

MIN_SYNTHETIC = 16  # different JPEG files, so that a server cannot answer from a cache
DIGITS = 256  # of the 1,797 that scikit-learn has


def synthetic_image(height: int, width: int, channels: int, seed: int) -> Pixels:
    """[H, W, C] uint8 that compresses about as well as a photograph: waves with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None] / height, np.arange(width)[:, None] / width
    pixels = 128 + rng.normal(scale=4, size=(height, width, channels))
    for octave in range(6):
        fy, fx, phase = rng.normal(size=(3, channels)) * 2.0**octave
        down, across = 2 * np.pi * y * fy + phase, 2 * np.pi * x * fx
        # sin(down + across), without computing the sine of every pixel
        waves = np.sin(down)[:, None] * np.cos(across) + np.cos(down)[:, None] * np.sin(across)
        pixels += 40 / 2.0 ** (octave / 2) * waves
    return pixels.clip(0, 255).astype(np.uint8)


def load_files(source: str, count: int) -> list[bytes]:
    """Image files: `jpeg` (synthetic, at least `count`), `photographs`, `digits`, or a path.

    Raises OSError or ImportError if there are none.
    """
    if source == "jpeg":
        return [_jpeg(seed) for seed in range(max(count, MIN_SYNTHETIC))]
    if source == "photographs":
        return [path.read_bytes() for path in sorted((_sklearn() / "images").glob("*.jpg"))]
    if source == "digits":
        return _digits()
    path = Path(source)
    paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(f"the folder {path} contains no files")
    return [path.read_bytes() for path in paths]


def load_pixels(source: str, count: int, height: int, width: int, channels: int) -> list[Pixels]:
    """Images as uint8 [H, W, C]. `raw` makes `count` synthetic images of the given size.

    Any other source is read as `load_files` does, then decoded and resized here.
    """
    if source == "raw":
        return [synthetic_image(height, width, channels, seed) for seed in range(count)]
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    read = []
    for content in load_files(source, count):
        with Image.open(io.BytesIO(content)) as image:
            fitted = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        read.append(np.asarray(fitted).reshape(height, width, channels))
    return read


def in_turn(contents: Sequence[Any], count: int) -> list[list[Any]]:
    """Consecutive groups of `count`. The last group is filled up with the first contents."""
    return [
        [contents[n % len(contents)] for n in range(first, first + count)]
        for first in range(0, len(contents), count)
    ]


def _jpeg(seed: int) -> bytes:
    """A synthetic JPEG file with the average size of ImageNet's photographs."""
    return _encode(synthetic_image(375, 500, 3, seed), "JPEG", quality=90)


def _digits() -> list[bytes]:
    """The first handwritten digits of the UCI set as PNG files of 32x32."""
    from PIL import Image

    with gzip.open(_sklearn() / "data" / "digits.csv.gz", "rt") as rows:
        values = np.loadtxt(rows, delimiter=",", max_rows=DIGITS)[:, :64]
    small = (values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [_encode(np.asarray(Image.fromarray(one).resize((32, 32))), "PNG") for one in small]


def _encode(image: Pixels, form: str, **options: Any) -> bytes:
    from PIL import Image  # only needed to send files

    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def _sklearn() -> Path:
    """Folder of scikit-learn's data sets. Importing scikit-learn would take a second."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ImportError("these images come with scikit-learn: pip install scikit-learn")
    return Path(found.submodule_search_locations[0]) / "datasets"
