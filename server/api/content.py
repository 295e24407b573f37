"""The images of a request in plain values, and how the model's pixels are made from them.

Each class knows the names that its fields have in the request, so that errors can name them. The
classes for the Open Inference Protocol are in server.api.v2.tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from server.api.decode_time import Data
from server.api.decoders import Decoders, Work
from server.engines.base import RowSource
from server.errors import InvalidInput
from server.images.decode import batch_from_pixels, decode, from_pixels
from server.images.input_spec import ImageLimits, InputSpec, Pixels
from server.models.version import LoadedModel


class Content(ABC):
    """Images of one request."""

    __slots__ = ()

    @abstractmethod
    def count(self, model: LoadedModel, max_images: int) -> int:
        """The number of images. Makes all checks that need no pixels. Raises InvalidInput."""

    def thread_work(self, spec: InputSpec) -> Sequence[Data]:
        """The data that threads must decode to make the pixels; empty if there is none."""
        return ()

    @abstractmethod
    def pixels(
        self, spec: InputSpec, decoders: Decoders
    ) -> Pixels | RowSource | Awaitable[Pixels | RowSource]:
        """[N, H, W, C] for the model, or an awaitable of them. Raises InvalidInput, Overloaded.

        Called once, after the request is admitted. It returns pixels that need no work directly: a
        thread would cost more than it saves.
        """


def check_count(field: str, images: int, max_images: int) -> int:
    """Returns the number of images. Raises InvalidInput if there are too few or too many."""
    if not 1 <= images <= max_images:
        raise InvalidInput(field, f"is {images}; a request may have 1 to {max_images} images")
    return images


class InvalidContent(Content):
    """An error in a request, raised once its model is known, so that metrics can name the model."""

    __slots__ = ("_error",)

    def __init__(self, error: InvalidInput) -> None:
        self._error = error

    def count(self, model: LoadedModel, max_images: int) -> int:
        raise self._error

    def pixels(self, spec: InputSpec, decoders: Decoders) -> Pixels:
        raise self._error


class ImageFile(NamedTuple):
    """An image file."""

    data: bytes
    field: str  # its name in the request

    def work(self, spec: InputSpec, limits: ImageLimits) -> tuple[Callable[..., Pixels], Any]:
        return decode, (self.data, spec, limits, self.field)

    def has_shape(self, spec: InputSpec) -> bool:
        return False


class RawImage(NamedTuple):
    """Pixels of one image."""

    data: bytes
    height: int
    width: int
    channels: int
    field: str  # its name in the request

    def work(self, spec: InputSpec, limits: ImageLimits) -> tuple[Callable[..., Pixels], Any]:
        size = self.height, self.width, self.channels
        return from_pixels, (self.data, *size, spec, limits, self.field)

    def has_shape(self, spec: InputSpec) -> bool:
        return (self.height, self.width, self.channels) == (spec.height, spec.width, spec.channels)


class EmptyImage(NamedTuple):
    """An image without content: an error, found once the request is admitted."""

    field: str
    data: bytes = b""

    def work(self, spec: InputSpec, limits: ImageLimits) -> tuple[Callable[..., Pixels], Any]:
        raise InvalidInput(self.field, "is empty; give encoded or raw")

    def has_shape(self, spec: InputSpec) -> bool:
        return False


class OneImage(Protocol):
    """An image of a request, in one of its forms."""

    @property
    def data(self) -> bytes:
        """The bytes of its file or of its pixels."""

    def work(self, spec: InputSpec, limits: ImageLimits) -> tuple[Callable[..., Pixels], Any]:
        """The function that makes its row, with the arguments. Raises InvalidInput."""

    def has_shape(self, spec: InputSpec) -> bool:
        """Whether it has the pixels of the model's size already."""


class ImageList(Content):
    """Images one by one, each a file or pixels."""

    __slots__ = ("_images",)

    def __init__(self, images: Sequence[OneImage]) -> None:
        self._images = images

    def count(self, model: LoadedModel, max_images: int) -> int:
        return check_count("images", len(self._images), max_images)

    def thread_work(self, spec: InputSpec) -> Sequence[Data]:
        return [image.data for image in self._images if not image.has_shape(spec)]

    def pixels(self, spec: InputSpec, decoders: Decoders) -> Pixels | Awaitable[Pixels]:
        if len(self._images) == 1:
            image = self._images[0]
            if isinstance(image, RawImage) and image.has_shape(spec):
                view = spec.view(image.data, 1)
                if view is not None:
                    return view
        return self._decode(spec, decoders)

    async def _decode(self, spec: InputSpec, decoders: Decoders) -> Pixels:
        rows: list[Pixels | None] = [None] * len(self._images)
        work: list[Work] = []
        for index, image in enumerate(self._images):
            function, arguments = image.work(spec, decoders.limits)
            if image.has_shape(spec):
                rows[index] = function(*arguments)
            else:
                work.append((index, function, arguments))
        return await decoders.rows(rows, work)


class PixelBatch(Content):
    """Pixels of several images of one size."""

    __slots__ = ("_channels", "_count", "_data", "_height", "_width")

    def __init__(self, data: bytes, count: int, height: int, width: int, channels: int) -> None:
        self._data = data
        self._count = count
        self._height = height
        self._width = width
        self._channels = channels

    def count(self, model: LoadedModel, max_images: int) -> int:
        return check_count("pixels.count", self._count, max_images)

    def thread_work(self, spec: InputSpec) -> Sequence[Data]:
        is_model_size = (self._height, self._width, self._channels) == spec.shape
        return () if is_model_size else (self._data,)

    def pixels(self, spec: InputSpec, decoders: Decoders) -> Pixels | Awaitable[Pixels]:
        size = self._height, self._width, self._channels
        is_model_size = size == (spec.height, spec.width, spec.channels)
        if is_model_size:
            view = spec.view(self._data, self._count)
            if view is not None:
                return view
        arguments = self._data, self._count, *size, spec, decoders.limits, "pixels"
        if is_model_size:
            return batch_from_pixels(*arguments)  # raises: the data has the wrong length
        return decoders.batch(self._count, batch_from_pixels, *arguments)
