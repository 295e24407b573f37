"""What a network or a server answered to each image of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NO_CLASS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Answers in the order of the samples. An image that can't be read has none."""

    source: str  # what answered: "lenet5 version 3, openvino-bf16"
    classes: NDArray[np.int32]  # [N, K], best first; NO_CLASS where there is none
    confidence: NDArray[np.float32]  # [N], the probability of the best class
    unreadable: dict[int, str] = field(default_factory=dict)  # index of the image -> why
    seconds: float = 0.0

    @property
    def is_readable(self) -> NDArray[np.bool_]:
        """[N]"""
        readable: NDArray[np.bool_] = self.classes[:, 0] != NO_CLASS
        return readable

    @property
    def images_per_s(self) -> float:
        return float(self.is_readable.sum()) / self.seconds if self.seconds else 0.0


def empty(count: int, top_k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Classes [count, top_k] and confidences [count], to be filled in."""
    return np.full((count, top_k), NO_CLASS, np.int32), np.zeros(count, np.float32)
