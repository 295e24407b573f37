"""Writes small colour pictures of handwritten digits, one folder per class: zero to four.

    python docs/examples/digit_pictures.py FOLDER

FOLDER/train and FOLDER/val get different pictures. They are the UCI digits that come with
scikit-learn (CC BY 4.0), as coloured ink on coloured paper.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = ("zero", "one", "two", "three", "four")
TRAIN, VAL = 40, 40  # pictures per class
SIZE = 32  # pixels


def write(folder: Path) -> None:
    """Writes all pictures. The same on every machine."""
    digits = load_digits()
    colours = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        chosen = digits.images[digits.target == index][: TRAIN + VAL] / 16  # ink, 0 to 1
        for number, ink in enumerate(chosen):
            path = folder / ("train" if number < TRAIN else "val") / name / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            paper, pen = colours.uniform(150, 255, 3), colours.uniform(0, 90, 3)
            pixels = paper + ink[..., None] * (pen - paper)
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(f"{len(CLASSES)} classes in {sys.argv[1]}: {TRAIN} pictures each to train, {VAL} to test")
