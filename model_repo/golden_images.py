"""Real images for the golden check.

They come with scikit-image and scikit-learn, and are read from the installed packages. Nothing is
downloaded, and this repository holds no copy.
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


class PackagedImage(NamedTuple):
    """An image file inside an installed package."""

    package: str
    file: str
    licence: str  # and the owner, as the package states them


COLOUR_IMAGES = (
    PackagedImage("skimage.data", "astronaut.png", "public domain; NASA"),
    PackagedImage("skimage.data", "chelsea.png", "CC0 1.0; Stefan van der Walt"),
    PackagedImage("skimage.data", "coffee.png", "CC0 1.0; Rachel Michetti, Pikolo Espresso Bar"),
    PackagedImage("skimage.data", "rocket.jpg", "public domain; SpaceX"),
    PackagedImage("sklearn.datasets.images", "china.jpg", "CC BY 2.0; danielbuechele on Flickr"),
    PackagedImage("sklearn.datasets.images", "flower.jpg", "CC BY 2.0; vultilion on Flickr"),
)


def golden_pixels(spec: InputSpec) -> Pixels:
    """[G, H, W, C]: images that went through the server's decoder, as a client's images do.

    COLOUR_IMAGES for a network with three channels, ten digits for a network with one.
    """
    encoded = colour_images() if spec.channels == 3 else digit_images()
    return np.stack([decode(image, spec) for image in encoded])


def colour_images() -> list[bytes]:
    """The files of COLOUR_IMAGES, in that order."""
    return [
        resources.files(image.package).joinpath(image.file).read_bytes() for image in COLOUR_IMAGES
    ]


def digit_images() -> list[bytes]:
    """The first held-out digit of each class, as a PNG of 8x8 grey pixels.

    UCI handwritten digits, CC BY 4.0; E. Alpaydin, C. Kaynak, UCI Machine Learning Repository.
    """
    images, labels = digits.held_out()
    encoded = []
    for label in range(10):
        file = io.BytesIO()
        Image.fromarray(images[labels == label][0]).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded
