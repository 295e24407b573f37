"""Any bytes give pixels of the model's shape, or an InvalidInput that names the field."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from server.errors import InvalidInput
from server.images.decode import batch_from_pixels, decode, from_pixels
from server.images.input_spec import ImageLimits, InputSpec

LIMITS = ImageLimits(pixels=200_000, side=2_000)
SIGNATURES = [
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"RIFF\x40\0\0\0WEBPVP8L",
    b"RIFF\x40\0\0\0WEBPVP8X",
    b"BM",
]
specs = st.builds(
    InputSpec,
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    resize=st.integers(0, 50),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
repeatable = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def valid_files() -> list[bytes]:
    pixels = np.random.default_rng(1).integers(0, 256, (12, 17, 3), np.uint8)
    image = Image.fromarray(pixels)
    files = []
    for format, converted in [
        ("JPEG", image),
        ("JPEG", image.convert("L")),
        ("PNG", image),
        ("PNG", image.quantize(8)),
        ("PNG", image.convert("LA")),
        ("GIF", image),
        ("WEBP", image),
        ("BMP", image),
    ]:
        buffer = BytesIO()
        converted.save(buffer, format)
        files.append(buffer.getvalue())
    return files


def outcome(call: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8] | InvalidInput:
    try:
        return call()
    except InvalidInput as error:
        return error


def check_outcome(file: bytes, spec: InputSpec) -> None:
    pixels = outcome(lambda: decode(file, spec, LIMITS, "images[3].encoded"))
    if isinstance(pixels, InvalidInput):
        assert pixels.field == "images[3].encoded"
    else:
        assert pixels.shape == spec.shape
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


@repeatable
@given(st.binary(max_size=400), st.sampled_from([b"", *SIGNATURES]), specs)
def test_any_bytes_are_decoded_or_rejected(tail: bytes, signature: bytes, spec: InputSpec) -> None:
    check_outcome(signature + tail, spec)


@repeatable
@given(st.sampled_from(valid_files()), specs, st.data())
def test_any_changed_file_is_decoded_or_rejected(
    file: bytes, spec: InputSpec, data: st.DataObject
) -> None:
    changed = bytearray(file)
    for _ in range(data.draw(st.integers(0, 6))):
        begin = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(begin, min(begin + 4, len(changed))))
        changed[begin:end] = data.draw(st.binary(max_size=6))
    check_outcome(bytes(changed), spec)


@repeatable
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    spec=specs,
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA"]),
)
def test_any_valid_file_is_decoded(width: int, height: int, spec: InputSpec, mode: str) -> None:
    buffer = BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), spec, LIMITS).shape == spec.shape


sizes = st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1))


@repeatable
@given(sizes, sizes, st.integers(0, 5), specs, st.sampled_from([0, 0, 0, -1, 1]))
def test_raw_pixels_are_accepted_exactly_if_their_size_is_as_declared(
    height: int, width: int, channels: int, spec: InputSpec, wrong_by: int
) -> None:
    valid = 1 <= height <= 2_000 and 1 <= width <= 2_000 and height * width <= 200_000
    valid = valid and channels in (1, 3) and not wrong_by
    needed = min(height * width * channels, 600_000)
    data = bytes(max(0, needed + wrong_by))
    pixels = outcome(lambda: from_pixels(data, height, width, channels, spec, LIMITS))
    if isinstance(pixels, InvalidInput):
        assert not valid
        assert pixels.field.startswith("images[0].raw.")
    else:
        assert valid
        assert pixels.shape == spec.shape


@repeatable
@given(
    count=st.integers(0, 9),
    height=st.integers(0, 30),
    width=st.integers(0, 30),
    channels=st.integers(0, 4),
    spec=specs,
    wrong_by=st.sampled_from([0, 0, 0, -1, 1]),
)
def test_a_raw_batch_is_accepted_exactly_if_its_size_is_as_declared(
    count: int, height: int, width: int, channels: int, spec: InputSpec, wrong_by: int
) -> None:
    valid = count > 0 and height > 0 and width > 0 and channels in (1, 3) and not wrong_by
    data = bytes(max(0, count * height * width * channels + wrong_by))
    batch = outcome(lambda: batch_from_pixels(data, count, height, width, channels, spec, LIMITS))
    if isinstance(batch, InvalidInput):
        assert not valid
        assert batch.field.startswith("pixels.")
    else:
        assert valid
        assert batch.shape == (count, *spec.shape)
        assert batch.flags.c_contiguous
