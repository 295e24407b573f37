"""Each option of a model's input gives the pixels of a reference, on real photographs.

The references are torch's interpolation, which torchvision uses for tensors, and Pillow's own
operations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn import functional as F

from server.images.decode import batch_from_pixels, decode
from server.images.input_spec import InputSpec
from tests.images.image_files import PHOTOGRAPHS, difference, encoded, noise, photo

Size = tuple[int, int]  # height, width


def interpolated(image: Image.Image, size: Size, mode: str, *, antialias: bool) -> torch.Tensor:
    """[H, W, C] levels, as torchvision computes them for a tensor."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(tensor, size, mode=mode, align_corners=False, antialias=antialias)
    return resized.round().clamp(0, 255)[0].permute(1, 2, 0)


def cropped(image: torch.Tensor, size: Size) -> NDArray[np.uint8]:
    top, left = (round((have - want) / 2) for have, want in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]].numpy().astype(np.uint8)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_without_antialiasing_pixels_are_torchs_to_one_level(name: str, mode: str) -> None:
    file, image = PHOTOGRAPHS[name].read_bytes(), photo(name)
    for size in ((224, 224), (97, 31), (300, 800)):
        exact = decode(file, InputSpec(*size, 3, interpolation=mode, antialias=False))
        reference = interpolated(image, size, mode, antialias=False).numpy().astype(np.uint8)
        assert difference(exact, reference) <= 1
        assert (exact != reference).mean() < 0.01, "only where the rounding is a tie"
    shorter = min(image.size)
    resized = tuple(int(256 * side / shorter) for side in (image.height, image.width))
    whole = interpolated(image, (resized[0], resized[1]), mode, antialias=False)
    crop = decode(file, InputSpec(224, 200, 3, 256, interpolation=mode, antialias=False))
    assert difference(crop, cropped(whole, (224, 200))) <= 1


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_with_antialiasing_pixels_are_torchs_to_one_level(name: str) -> None:
    file, image = PHOTOGRAPHS[name].read_bytes(), photo(name)
    for size in ((224, 224), (97, 31)):
        pixels = decode(file, InputSpec(*size, 3))
        reference = interpolated(image, size, "bilinear", antialias=True)
        assert difference(pixels, reference.numpy().astype(np.uint8)) <= 1


def test_the_two_ways_differ_where_an_image_gets_much_smaller() -> None:
    image = noise(800, 600)
    smooth, sampled = (
        decode(encoded(image, "PNG"), InputSpec(60, 80, 3, antialias=antialias))
        for antialias in (True, False)
    )
    assert smooth.std() < sampled.std() / 3


@pytest.mark.parametrize("size", [(224, 224), (100, 300), (300, 100)])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_letterbox_is_the_whole_image_on_the_fill_colour(name: str, size: Size) -> None:
    height, width = size
    spec = InputSpec(height, width, 3, letterbox=True, fill=(124, 116, 104))
    pixels = decode(PHOTOGRAPHS[name].read_bytes(), spec)
    image = photo(name)
    scale = min(width / image.width, height / image.height)
    inner = round(image.width * scale), round(image.height * scale)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    border = (left, top, width - inner[0] - left, height - inner[1] - top)
    resized = image.resize(inner, Image.Resampling.BILINEAR)
    assert difference(pixels, ImageOps.expand(resized, border, (124, 116, 104))) == 0


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (64, 64)])
def test_a_letterbox_takes_any_shape(size: Size, antialias: bool) -> None:
    spec = InputSpec(32, 48, 3, letterbox=True, fill=(9,), antialias=antialias)
    pixels = decode(encoded(noise(*size), "PNG"), spec)
    assert pixels.shape == (32, 48, 3)
    grey = decode(encoded(noise(*size), "PNG"), InputSpec(32, 48, 1, letterbox=True, fill=(9,)))
    assert grey.shape == (32, 48, 1)
    if size != (64, 64):
        assert (pixels[0, 0] == 9).all()
        assert grey[0, 0] == 9


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("resize", [0, 40, -1])
def test_raw_pixels_are_resized_like_a_file(resize: int, antialias: bool) -> None:
    """-1 stands for a letterbox."""
    spec = InputSpec(
        *(32, 36, 3, max(0, resize)),
        antialias=antialias,
        letterbox=resize < 0,
        fill=(1, 2, 3) if resize < 0 else (0,),
    )
    image = noise(80, 60)
    raw = batch_from_pixels(np.asarray(image).tobytes(), 1, 60, 80, 3, spec)
    assert difference(raw[0], decode(encoded(image, "PNG"), spec)) == 0
    grey = image.convert("L")
    raw = batch_from_pixels(np.asarray(grey).tobytes(), 1, 60, 80, 1, spec)
    assert difference(raw[0], decode(encoded(grey, "PNG"), spec)) == 0
