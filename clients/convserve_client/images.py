"""Puts images into Classify requests, as files or as pixels."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from convserve_client.errors import InvalidInput, Violation
from convserve_client.stubs import classify_pb2 as pb


@runtime_checkable
class PixelArray(Protocol):
    """Pixels as uint8, for example a numpy array. The client itself does not need numpy."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def tobytes(self) -> bytes: ...


Image = bytes | os.PathLike[str] | PixelArray
"""The bytes of an image file, its path, or its pixels as [H, W, C] or [H, W]."""


async def add_images(request: pb.ClassifyRequest, images: Image | Sequence[Image]) -> None:
    """Adds one image, several images, or an array of images [N, H, W, C] to a request."""
    if isinstance(images, PixelArray) and len(images.shape) == 4:
        _check_dtype("pixels", images)
        pixels = request.pixels
        pixels.count, pixels.height, pixels.width, pixels.channels = images.shape
        pixels.data = images.tobytes()
        return
    if isinstance(images, bytes | os.PathLike | PixelArray):
        images = [images]
    for index, image in enumerate(images):
        if isinstance(image, PixelArray):
            _add_pixels(request, f"images[{index}]", image)
        elif isinstance(image, os.PathLike):
            request.images.add().encoded = await asyncio.to_thread(Path(image).read_bytes)
        elif isinstance(image, bytes):
            request.images.add().encoded = image
        else:
            raise TypeError(
                f"images[{index}] is {type(image).__name__}; it may be bytes, a pathlib.Path"
                " or a numpy array"
            )


def _add_pixels(request: pb.ClassifyRequest, field: str, image: PixelArray) -> None:
    _check_dtype(field, image)
    if len(image.shape) not in (2, 3):
        raise _invalid_input(field, f"shape {image.shape} is not [H, W, C] or [H, W]")
    raw = request.images.add().raw
    raw.height, raw.width, *channels = image.shape
    raw.channels = channels[0] if channels else 1
    raw.data = image.tobytes()


def _check_dtype(field: str, pixels: PixelArray) -> None:
    if str(pixels.dtype) != "uint8":
        raise _invalid_input(field, f"dtype {pixels.dtype} given; pixels are uint8, 0 to 255")


def _invalid_input(field: str, description: str) -> InvalidInput:
    return InvalidInput(f"{field}: {description}", violations=(Violation(field, description),))
