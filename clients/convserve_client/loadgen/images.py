"""Pictures to send, as files or as pixels: made up, scikit-learn's own, or those of a folder."""

import gzip
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, Any]

MADE_UP = 16  # different made-up JPEG files at least, so that nobody can answer from a memory
DIGITS = 256  # of the 1,797 that scikit-learn has


def picture(height: int, width: int, channels: int, seed: int) -> Pixels:
    """[H, W, C] uint8 that compresses about as a photograph does: waves, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(height)[:, None] / height, np.arange(width)[:, None] / width
    picture = 128 + rng.normal(scale=4, size=(height, width, channels))
    for octave in range(6):
        fy, fx, phase = rng.normal(size=(3, channels)) * 2.0**octave
        down, across = 2 * np.pi * y * fy + phase, 2 * np.pi * x * fx
        # sin(down + across), without asking for the sine of every pixel
        waves = np.sin(down)[:, None] * np.cos(across) + np.cos(down)[:, None] * np.sin(across)
        picture += 40 / 2.0 ** (octave / 2) * waves
    return picture.clip(0, 255).astype(np.uint8)


def files(source: str, count: int) -> list[bytes]:
    """Image files: `jpeg` (made up, at least `count`), `photographs`, `digits`, or those at a path.

    Raises OSError or ImportError where there are none to be had.
    """
    if source == "jpeg":
        return [_jpeg(seed) for seed in range(max(count, MADE_UP))]
    if source == "photographs":
        return [path.read_bytes() for path in sorted((_sklearn() / "images").glob("*.jpg"))]
    if source == "digits":
        return _digits()
    path = Path(source)
    paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(f"there is no file in {path}")
    return [path.read_bytes() for path in paths]


def pixels(source: str, count: int, height: int, width: int, channels: int) -> list[Pixels]:
    """[H, W, C] uint8 each: `raw` makes up `count` of them, any other source is read as `files`
    does and resized here, as a caller would who wants to spare the server the work."""
    if source == "raw":
        return [picture(height, width, channels, seed) for seed in range(count)]
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    read = []
    for content in files(source, count):
        with Image.open(io.BytesIO(content)) as image:
            fitted = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        read.append(np.asarray(fitted).reshape(height, width, channels))
    return read


def in_turn(contents: Sequence[Any], count: int) -> list[list[Any]]:
    """Groups of `count`, one after the other, the first ones again where they run out."""
    return [
        [contents[n % len(contents)] for n in range(first, first + count)]
        for first in range(0, len(contents), count)
    ]


def _jpeg(seed: int) -> bytes:
    """A picture of the size that photographs in ImageNet have on average."""
    return _encoded(picture(375, 500, 3, seed), "JPEG", quality=90)


def _digits() -> list[bytes]:
    """The first handwritten digits of the UCI set as PNG files of 32x32."""
    from PIL import Image

    with gzip.open(_sklearn() / "data" / "digits.csv.gz", "rt") as rows:
        values = np.loadtxt(rows, delimiter=",", max_rows=DIGITS)[:, :64]
    small = (values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [_encoded(np.asarray(Image.fromarray(one).resize((32, 32))), "PNG") for one in small]


def _encoded(image: Pixels, form: str, **options: Any) -> bytes:
    from PIL import Image  # only who sends files needs it

    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def _sklearn() -> Path:
    """Where scikit-learn keeps its data sets; it is not imported, which takes a second."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ImportError("these pictures come with scikit-learn: pip install scikit-learn")
    return Path(found.submodule_search_locations[0]) / "datasets"
