"""Raw pixels become the model's pixels, without a copy if they have its shape."""

import numpy as np
import pytest

from server.errors import InvalidInput
from server.images.decode import batch_from_pixels, decode, from_pixels
from server.images.input_spec import InputSpec
from tests.images.image_files import IMAGENET, encoded, noise, photo


def test_raw_pixels_of_the_models_shape_are_not_copied() -> None:
    data = noise(32, 16).tobytes()
    pixels = from_pixels(data, 16, 32, 3, InputSpec(16, 32, 3))
    assert np.shares_memory(pixels, np.frombuffer(data, np.uint8))
    assert pixels.tobytes() == data
    batch = batch_from_pixels(data, 4, 4, 32, 3, InputSpec(4, 32, 3, resize=99))
    assert np.shares_memory(batch, np.frombuffer(data, np.uint8))
    assert batch.shape == (4, 4, 32, 3)


def test_raw_pixels_of_another_size_are_resized_like_a_file() -> None:
    image = photo()
    pixels = from_pixels(image.tobytes(), image.height, image.width, 3, IMAGENET)
    assert np.array_equal(pixels, decode(encoded(image, "PNG"), IMAGENET))
    grey = image.convert("L")
    pixels = from_pixels(grey.tobytes(), grey.height, grey.width, 1, IMAGENET)
    assert np.array_equal(pixels, decode(encoded(grey, "PNG"), IMAGENET))


@pytest.mark.parametrize("resize", [0, 9])
def test_raw_channels_are_converted_to_the_models(resize: int) -> None:
    image = photo().resize((8, 6))
    grey = image.convert("L")
    size = (8, 6) if not resize else (7, 7)
    pixels = from_pixels(image.tobytes(), 6, 8, 3, InputSpec(size[1], size[0], 1, resize))
    expected = decode(encoded(image, "PNG"), InputSpec(size[1], size[0], 1, resize))
    assert np.array_equal(pixels, expected)
    pixels = from_pixels(grey.tobytes(), 6, 8, 1, InputSpec(size[1], size[0], 3, resize))
    expected = decode(encoded(grey, "PNG"), InputSpec(size[1], size[0], 3, resize))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("shape", [(6, 8, 3), (6, 8, 1), (12, 16, 3), (5, 9, 1)])
@pytest.mark.parametrize("spec", [InputSpec(6, 8, 3), InputSpec(6, 8, 1), InputSpec(4, 4, 3, 5)])
def test_a_raw_batch_equals_its_images_one_by_one(
    shape: tuple[int, int, int], spec: InputSpec
) -> None:
    images = np.random.default_rng(5).integers(0, 256, (3, *shape), np.uint8)
    batch = batch_from_pixels(images.tobytes(), 3, *shape, spec)
    assert batch.flags.c_contiguous
    singles = [from_pixels(image.tobytes(), *shape, spec) for image in images]
    assert np.array_equal(batch, np.stack(singles))


@pytest.mark.parametrize(
    ("size", "part", "words"),
    [
        ((0, 8, 3), "height", "is 0; 1 to 65,535 is allowed"),
        ((8, 0, 3), "width", "is 0; 1 to 65,535 is allowed"),
        ((2**32 - 1, 2**32 - 1, 3), "height", "is 4,294,967,295; 1 to 65,535 is allowed"),
        ((8, 2**32 - 1, 3), "width", "is 4,294,967,295; 1 to 65,535 is allowed"),
        ((65_535, 65_535, 3), "height", "65,535 x 65,535 pixels are given; at most 50,000,000"),
        ((8, 8, 0), "channels", "is 0; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 4), "channels", "is 4; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 2**32 - 1), "channels", "is 4,294,967,295; 1 (grey) or 3 (RGB) is allowed"),
        ((8, 8, 1), "data", "has 192 bytes; 8 x 8 x 1 needs 64"),
        ((8, 9, 3), "data", "has 192 bytes; 8 x 9 x 3 needs 216"),
    ],
)
def test_wrong_raw_pixels_are_rejected_with_the_field_and_what_is_allowed(
    size: tuple[int, int, int], part: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_pixels(bytes(192), *size, IMAGENET, field="images[2].raw")
    assert caught.value.field == f"images[2].raw.{part}"
    assert words in caught.value.description


def test_a_wrong_raw_batch_is_rejected_with_the_field_and_what_is_allowed() -> None:
    def rejection_of(data: bytes, count: int, side: int) -> tuple[str, str]:
        with pytest.raises(InvalidInput) as caught:
            batch_from_pixels(data, count, side, side, 3, IMAGENET)
        return caught.value.field, caught.value.description

    assert rejection_of(b"", 0, 1) == ("pixels.count", "is 0; at least 1 is needed")
    assert rejection_of(bytes(12), 2**32 - 1, 2)[0] == "pixels.data"
    assert rejection_of(bytes(23), 2, 2) == ("pixels.data", "has 23 bytes; 2 x 2 x 2 x 3 needs 24")
    field, words = rejection_of(bytes(30_000), 10_000, 1)
    assert field == "pixels.count"
    assert "10,000 images would take 1,505,280,000 bytes" in words
