"""Real images that ship inside scikit-image and scikit-learn, for the golden check.

Their files are read where pip has put them: nothing is downloaded, nothing is copied into this
repository.
"""

from __future__ import annotations

import io
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from model_repo import digits
from server.images.decode import decode
from server.images.input_spec import InputSpec, Pixels


class Photograph(NamedTuple):
    """A file inside an installed package."""

    package: str
    file: str
    licence: str  # and whose it is, in the words of the package


PHOTOGRAPHS = (
    Photograph("skimage.data", "astronaut.png", "public domain; NASA"),
    Photograph("skimage.data", "chelsea.png", "CC0 1.0; Stefan van der Walt"),
    Photograph("skimage.data", "coffee.png", "CC0 1.0; Rachel Michetti, Pikolo Espresso Bar"),
    Photograph("skimage.data", "rocket.jpg", "public domain; SpaceX"),
    Photograph("sklearn.datasets.images", "china.jpg", "CC BY 2.0; danielbuechele on Flickr"),
    Photograph("sklearn.datasets.images", "flower.jpg", "CC BY 2.0; vultilion on Flickr"),
)

# The UCI handwritten digits, CC BY 4.0; E. Alpaydin, C. Kaynak.
DIGITS_LICENCE = "CC BY 4.0; E. Alpaydin, C. Kaynak, UCI Machine Learning Repository"


def golden_pixels(spec: InputSpec) -> Pixels:
    """[G, H, W, C]: the images as a client's would arrive, by way of the server's decoder.

    Photographs for a colour network, the first held-out digit of each class for a grey one.
    """
    encoded = photographs() if spec.channels == 3 else first_digits()
    return np.stack([decode(image, spec) for image in encoded])


def photographs() -> list[bytes]:
    """The files of PHOTOGRAPHS, in that order."""
    return [
        resources.files(photograph.package).joinpath(photograph.file).read_bytes()
        for photograph in PHOTOGRAPHS
    ]


def first_digits() -> list[bytes]:
    """A PNG of 8x8 grey pixels for each of the ten digits, of those that nothing was trained on."""
    images, labels = digits.held_out()
    encoded = []
    for label in range(10):
        file = io.BytesIO()
        Image.fromarray(images[labels == label][0]).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded
