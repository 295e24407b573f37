"""Images are resized and cropped exactly like torchvision does on Pillow images."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from server.images.decode import decode
from server.images.input_spec import InputSpec
from tests.images.image_files import IMAGENET, PHOTOGRAPHS, difference, encoded, noise, photo


def torchvision(image: Image.Image, spec: InputSpec, resampling: int) -> NDArray[np.uint8]:
    """Resize(spec.resize) and CenterCrop(spec) of torchvision on a Pillow image."""
    width, height = image.size
    if width <= height:
        resized = (spec.resize, int(spec.resize * height / width))
    else:
        resized = (int(spec.resize * width / height), spec.resize)
    image = image.resize(resized, resampling)
    width, height = image.size
    if spec.width > width or spec.height > height:
        image = ImageOps.expand(
            image,
            (
                (spec.width - width) // 2 if spec.width > width else 0,
                (spec.height - height) // 2 if spec.height > height else 0,
                (spec.width - width + 1) // 2 if spec.width > width else 0,
                (spec.height - height + 1) // 2 if spec.height > height else 0,
            ),
        )
        width, height = image.size
    left, top = round((width - spec.width) / 2.0), round((height - spec.height) / 2.0)
    image = image.crop((left, top, left + spec.width, top + spec.height))
    return np.asarray(image).reshape(spec.shape)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_is_resized_and_cropped_exactly_like_torchvision(name: str) -> None:
    pixels = decode(PHOTOGRAPHS[name].read_bytes(), IMAGENET)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    reference = torchvision(photo(name), IMAGENET, Image.Resampling.BILINEAR)
    assert difference(pixels, reference) == 0


@pytest.mark.parametrize(
    "size", [(640, 427), (427, 640), (256, 256), (224, 224), (257, 301), (10, 3), (9, 300), (1, 1)]
)
@pytest.mark.parametrize("crop", [(224, 224), (227, 227), (256, 300), (299, 100), (400, 401)])
def test_any_size_is_cropped_and_padded_exactly_like_torchvision(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    image, spec = noise(*size), InputSpec(*crop, 3, resize=256)
    reference = torchvision(image, spec, Image.Resampling.BILINEAR)
    assert difference(decode(encoded(image, "BMP"), spec), reference) == 0


@pytest.mark.parametrize("size", [(640, 427), (300, 512), (100, 90)])
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_every_interpolation_equals_pillows(name: str, size: tuple[int, int]) -> None:
    image, resampling = noise(*size), Image.Resampling[name.upper()]
    file = encoded(image, "PNG")
    cut = InputSpec(224, 224, 3, resize=256, interpolation=name)
    assert difference(decode(file, cut), torchvision(image, cut, resampling)) == 0
    whole = InputSpec(32, 48, 3, interpolation=name)
    assert difference(decode(file, whole), image.resize((48, 32), resampling)) == 0


def test_a_model_with_one_channel_gets_luma() -> None:
    pixels = decode(encoded(photo(), "PNG"), InputSpec(28, 28, 1))
    assert difference(pixels[:, :, 0], photo().convert("L").resize((28, 28), 2)) == 0


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (65_535, 2)])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_an_extreme_shape_needs_little_time(
    size: tuple[int, int], interpolation: str, antialias: bool
) -> None:
    """Resized whole, 1 x 50,000 would become 256 x 12,800,000."""
    file = encoded(noise(*size), "PNG")
    way: dict[str, Any] = {"interpolation": interpolation, "antialias": antialias}
    specs = [
        InputSpec(224, 224, 3, resize=256, **way),
        InputSpec(224, 224, 3, **way),
        InputSpec(224, 224, 3, letterbox=True, **way),
    ]
    tracemalloc.start()
    try:
        began = time.process_time()
        for spec in specs:
            assert decode(file, spec).shape == (224, 224, 3)
        assert time.process_time() - began < 5
    finally:
        tracemalloc.stop()
