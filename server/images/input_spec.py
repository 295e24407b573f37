"""The pixels a model takes, and the limits for the images it accepts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.images.memory import UNLIMITED, MemoryBudget

Pixels = NDArray[np.uint8]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_PIXELS = 89_478_485  # Pillow's own limit


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The shape of a model's input, and how to resize an image to it.

    There are three ways. With `resize`, the shorter side gets this length, and the centre is cut
    out. With `letterbox`, the whole image is scaled to fit inside, and `fill` surrounds it. With
    neither, both sides are resized, which changes the aspect ratio.
    """

    height: int
    width: int
    channels: int  # 1: grey, 3: RGB
    resize: int = 0  # new length of the shorter side before the centre crop; 0: no crop
    interpolation: str = "bilinear"
    # Whether an image that gets smaller is smoothed first, as Pillow does. Without, a pixel depends
    # only on the pixels next to its position, as for torchvision's antialias=False.
    antialias: bool = True
    letterbox: bool = False
    fill: tuple[int, ...] = (0,)  # of a letterbox: one value from 0 to 255, or one for each channel

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(
                f"height and width must be at least 1, not {self.height} x {self.width}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels}")
        if self.resize < 0:
            raise ValueError(f"resize must be 0 or a side in pixels, not {self.resize}")
        if self.interpolation not in INTERPOLATIONS:
            names = ", ".join(INTERPOLATIONS)
            raise ValueError(f"interpolation must be one of {names}, not {self.interpolation!r}")
        if self.interpolation == "lanczos" and not self.antialias:
            raise ValueError("interpolation lanczos always smooths; set antialias to true")
        if self.letterbox and self.resize:
            raise ValueError(f"resize must be 0 with letterbox, not {self.resize}")
        if len(self.fill) not in (1, self.channels) or not all(
            0 <= value <= 255 for value in self.fill
        ):
            raise ValueError(
                f"fill must be one number from 0 to 255, or {self.channels} of them, "
                f"not {list(self.fill)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    def view(self, data: bytes, rows: int) -> Pixels | None:
        """A [rows, H, W, C] view of raw pixels, or None if `data` has another length."""
        if len(data) != rows * self.height * self.width * self.channels:
            return None
        return np.frombuffer(data, np.uint8).reshape(rows, self.height, self.width, self.channels)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits that bound the memory and time of one image."""

    encoded_bytes: int = 20 << 20  # size of a file
    pixels: int = 50_000_000  # width x height, checked before decoding
    # The largest side of a JPEG. Pillow's resampling table takes 16 bytes for each pixel of a side.
    side: int = 65_535
    resized_bytes: int = 256 << 20  # a raw batch after resizing: many tiny images can become huge
    memory: MemoryBudget = UNLIMITED  # for the images that are decoded at the same time

    def __post_init__(self) -> None:
        for name in ("encoded_bytes", "pixels", "side", "resized_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.pixels > MAX_PIXELS:
            raise ValueError(f"pixels must be at most {MAX_PIXELS:,}, not {self.pixels:,}")


DEFAULT_LIMITS = ImageLimits()
