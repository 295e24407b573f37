"""Trains LeNet-5 on the UCI handwritten digits that scikit-learn ships: 1,797 pictures of 8x8.

    python -m model_repo.digits DIR    writes the held-out digits as DIR/<index>-<label>.png

The data set: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI Machine
Learning Repository, 1998 (CC BY 4.0). Writers are not told apart in it, so a held-out digit may be
by a hand that the network has seen; its accuracy says nothing of other pens and scanners.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from server.images.decode import batch_from_pixels
from server.images.input_spec import InputSpec

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

EPOCHS = 24
BATCH = 64
PEAK_RATE = 0.05
MOMENTUM = 0.9
DECAY = 5e-4  # of the weights
SEED = 0

# How a digit may have been enlarged before it reaches us, beside our own bilinear way.
ENLARGED = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class Trained:
    """How well the network does on the digits it has not seen."""

    held_out: int  # digits
    correct: int  # of them

    @property
    def accuracy(self) -> float:
        return self.correct / self.held_out


def held_out() -> tuple[Pixels, Labels]:
    """The digits that are never trained on: images [N, 8, 8], labels [N]; a fifth of each class."""
    images, labels, held = _split()
    return images[held], labels[held]


def train(
    network: nn.Module,
    spec: InputSpec,
    mean: float,
    std: float,
    progress: Callable[[int, int], None] | None = None,
    epochs: int = EPOCHS,
) -> Trained:
    """Sets the parameters of `network`, which takes [N, 1, H, W], and leaves it in eval mode.

    The same machine gives the same parameters whatever was drawn before. `progress` is called with
    the epochs done and in all.
    """
    with _one_thread():
        return _train(network, spec, mean, std, progress, epochs)


def write_held_out(folder: Path) -> int:
    """Writes every held-out digit as an 8x8 grey PNG, <index>-<label>.png, and counts them."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = held_out()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{index:03d}-{label}.png")
    return len(labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads make a network this small slower, and its sums come out in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    network: nn.Module,
    spec: InputSpec,
    mean: float,
    std: float,
    progress: Callable[[int, int], None] | None,
    epochs: int,
) -> Trained:
    images, labels, held = _split()
    looks = torch.stack([_tensor(look) for look in _looks(images[~held], spec)])
    answers = torch.from_numpy(labels[~held])
    generator = torch.Generator().manual_seed(SEED)
    _draw(network, generator)
    rows = len(answers)
    steps = epochs * math.ceil(rows / BATCH)
    descent = _Descent(network, steps)
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=generator)
        for batch in torch.split(order, BATCH):
            look = torch.randint(len(looks), (len(batch),), generator=generator)
            pixels = _wobbled(looks[look, batch], generator)
            logits = network((pixels - mean) / std)
            loss = F.cross_entropy(logits, answers[batch], label_smoothing=0.05)
            loss.backward()  # type: ignore[no-untyped-call]
            descent.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    network.eval()
    with torch.inference_mode():
        given = network((_tensor(_served(images[held], spec)) - mean) / std).argmax(1)
    return Trained(int(held.sum()), int((given.numpy() == labels[held]).sum()))


class _Descent:
    """Stochastic gradient descent with Nesterov's momentum; the rate rises for a fifth of the steps
    and falls to 0 along a cosine.

    Written out, because torch.optim loads torch's compiler, which takes longer than the training.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        self._parameters = list(network.parameters())
        self._velocities = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._steps = steps
        self._done = 0

    @torch.no_grad()
    def step(self) -> None:
        share = (self._done + 1) / (self._steps + 1)
        rate = PEAK_RATE * min(share / 0.2, (1 + math.cos(math.pi * (share - 0.2) / 0.8)) / 2)
        for parameter, velocity in zip(self._parameters, self._velocities, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad.add_(parameter, alpha=DECAY)
            velocity.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(gradient.add_(velocity, alpha=MOMENTUM), alpha=rate)
            parameter.grad = None
        self._done += 1


def _split() -> tuple[Pixels, Labels, NDArray[np.bool_]]:
    """All images, their labels, and which are held out: of each class every fifth, as they come.

    No random numbers, which another version of their library would draw differently.
    """
    # Here, so that networks with other weights can be built where scikit-learn is not installed.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the data are 0 to 16
    labels = bunch.target.astype(np.int64)
    held = np.zeros(len(labels), bool)
    for label in range(10):
        held[np.flatnonzero(labels == label)[4::5]] = True
    return images, labels, held


def _served(images: Pixels, spec: InputSpec) -> Pixels:
    """[N, h, w] -> [N, H, W], the way the server takes pixels."""
    count, height, width = images.shape
    return batch_from_pixels(images.tobytes(), count, height, width, 1, spec)[..., 0]


def _looks(images: Pixels, spec: InputSpec) -> list[Pixels]:
    """The same digits as different clients may send them, each [N, H, W]."""
    looks = [_served(images, spec)]
    for method in ENLARGED:
        looks.append(
            np.stack(
                [
                    np.asarray(Image.fromarray(image).resize((spec.width, spec.height), method))
                    for image in images
                ]
            )
        )
    return looks


def _tensor(images: Pixels) -> Tensor:
    """[N, H, W] of 0..255 -> [N, 1, H, W] of 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 255


def _draw(network: nn.Module, generator: torch.Generator) -> None:
    """He et al.'s first parameters, from a generator of our own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _wobbled(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image a little turned, slanted, scaled, moved, and brighter or darker; [N, 1, H, W]."""
    count = len(pixels)

    def draw(most: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * most

    angle, slant, scale = draw(0.16), draw(0.12), 1 + draw(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [cos, slant * cos - sin, draw(0.12), sin, slant * sin + cos, draw(0.12)], dim=1
    ).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False)  # bilinear, black outside
    light = (1 + draw(0.15)).view(count, 1, 1, 1)
    return (moved * light).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the held-out digits as PNG files.")
    parser.add_argument("folder", type=Path, help="where to; made if it is not there")
    folder = parser.parse_args().folder
    print(f"{write_held_out(folder)} digits written to {folder}")


if __name__ == "__main__":
    main()
