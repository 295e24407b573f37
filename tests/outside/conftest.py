"""A server with lenet5, and a digit to classify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.transport.attacks.processes import ServerProcess, convserve


class Digit(NamedTuple):
    """An image file, and what it shows."""

    path: Path
    label: int


@pytest.fixture(scope="package")
def server(built_repository: Path) -> Iterator[ServerProcess]:
    with convserve(built_repository, "--models=lenet5") as running:
        yield running


@pytest.fixture(scope="package")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Digit:
    from model_repo.digits import held_out  # imports torch: only if a test needs it

    images, labels = held_out()
    path = tmp_path_factory.mktemp("digits") / "digit.png"
    Image.fromarray(images[0]).save(path)
    return Digit(path, int(labels[0]))
