"""The held-out digits as image files, one folder per class."""

from pathlib import Path

import pytest
from PIL import Image

from model_repo import digits


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    images, labels = digits.held_out()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return root
