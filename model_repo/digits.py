"""Trains LeNet-5 on the UCI handwritten digits that come with scikit-learn: 1,797 images of 8x8.

    python -m model_repo.digits DIR    writes the held-out digits as DIR/<index>-<label>.png

Data set: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning
Repository, 1998 (CC BY 4.0). It does not say who wrote which digit, so the network may have seen
the handwriting of a held-out digit. The accuracy does not predict results for other pens and
scanners.
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
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05
SEED = 0

# Filters that a client may have used to enlarge a digit. The server itself uses bilinear.
CLIENT_FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Accuracy on the held-out digits."""

    held_out: int  # digits
    correct: int  # digits

    @property
    def accuracy(self) -> float:
        return self.correct / self.held_out


def held_out() -> tuple[Pixels, Labels]:
    """The digits that training never uses, a fifth of each class: images [N, 8, 8], labels [N]."""
    images, labels, is_held_out = _split()
    return images[is_held_out], labels[is_held_out]


def train(
    network: nn.Module,
    spec: InputSpec,
    mean: float,
    std: float,
    progress: Callable[[int, int], None] | None = None,
    epochs: int = EPOCHS,
) -> TrainingResult:
    """Trains `network`, which takes [N, 1, H, W], and leaves it in eval mode.

    The result is the same for every run on one machine; torch's global generator has no influence.
    `progress` receives the finished epochs and their total.
    """
    with _one_thread():
        return _train(network, spec, mean, std, progress, epochs)


def write_held_out(folder: Path) -> int:
    """Writes every held-out digit as an 8x8 grey PNG, <index>-<label>.png. Returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = held_out()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(folder / f"{index:03d}-{label}.png")
    return len(labels)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread. More threads are slower for a network this small, and they change
    the order of sums, so results would depend on their number."""
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
) -> TrainingResult:
    images, labels, is_held_out = _split()
    variants = torch.stack([_tensor(each) for each in _variants(images[~is_held_out], spec)])
    targets = torch.from_numpy(labels[~is_held_out])
    generator = torch.Generator().manual_seed(SEED)
    _initialise(network, generator)
    rows = len(targets)
    optimiser = _NesterovSgd(network, steps=epochs * math.ceil(rows / BATCH_SIZE))
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=generator)
        for batch in torch.split(order, BATCH_SIZE):
            variant = torch.randint(len(variants), (len(batch),), generator=generator)
            pixels = _augmented(variants[variant, batch], generator)
            logits = network((pixels - mean) / std)
            loss = F.cross_entropy(logits, targets[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    network.eval()
    with torch.inference_mode():
        pixels = _tensor(_resized_by_server(images[is_held_out], spec))
        predicted = network((pixels - mean) / std).argmax(1).numpy()
    return TrainingResult(
        held_out=int(is_held_out.sum()), correct=int((predicted == labels[is_held_out]).sum())
    )


class _NesterovSgd:
    """Stochastic gradient descent with Nesterov momentum and a one-cycle learning rate.

    The rate rises for the first fifth of the steps, then falls to 0 along a cosine. torch.optim is
    not used because it imports torch's compiler, which takes longer than the training.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        self._parameters = list(network.parameters())
        self._velocities = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._steps = steps
        self._done = 0

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters from their gradients, and clears the gradients."""
        done = (self._done + 1) / (self._steps + 1)
        rate = PEAK_LEARNING_RATE * min(
            done / 0.2, (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        )
        for parameter, velocity in zip(self._parameters, self._velocities, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad.add_(parameter, alpha=WEIGHT_DECAY)
            velocity.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(gradient.add_(velocity, alpha=MOMENTUM), alpha=rate)
            parameter.grad = None
        self._done += 1


def _split() -> tuple[Pixels, Labels, NDArray[np.bool_]]:
    """All images, their labels, and which are held out: every fifth digit of each class.

    It uses no random numbers, because another version of a library could draw different ones.
    """
    # Imported here, so that other networks can be built without scikit-learn.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the data are 0 to 16
    labels = bunch.target.astype(np.int64)
    is_held_out = np.zeros(len(labels), bool)
    for label in range(10):
        is_held_out[np.flatnonzero(labels == label)[4::5]] = True
    return images, labels, is_held_out


def _resized_by_server(images: Pixels, spec: InputSpec) -> Pixels:
    """[N, h, w] -> [N, H, W], as the server resizes raw pixels."""
    count, height, width = images.shape
    return batch_from_pixels(images.tobytes(), count, height, width, 1, spec)[..., 0]


def _variants(images: Pixels, spec: InputSpec) -> list[Pixels]:
    """The same digits as different clients may enlarge them, each [N, H, W]."""
    size = (spec.width, spec.height)
    variants = [_resized_by_server(images, spec)]
    for method in CLIENT_FILTERS:
        resized = [np.asarray(Image.fromarray(image).resize(size, method)) for image in images]
        variants.append(np.stack(resized))
    return variants


def _tensor(images: Pixels) -> Tensor:
    """[N, H, W] of 0..255 -> [N, 1, H, W] of 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 255


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """He initialisation from the given generator."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 1, H, W]: rotates, shears, scales, shifts and brightens each image at random."""
    count = len(pixels)

    def draw(limit: float) -> Tensor:
        """[count] numbers from -limit to limit."""
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, shear, scale = draw(0.16), draw(0.12), 1 + draw(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack(
        [cos, shear * cos - sin, draw(0.12), sin, shear * sin + cos, draw(0.12)], dim=1
    ).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False)  # bilinear, black outside
    brightness = (1 + draw(0.15)).view(count, 1, 1, 1)
    return (moved * brightness).clamp(0, 1)


def main() -> None:
    """Writes the held-out digits into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Writes the held-out digits as PNG files.")
    parser.add_argument("folder", type=Path, help="output folder; created if it does not exist")
    folder = parser.parse_args().folder
    print(f"{write_held_out(folder)} digits written to {folder}")


if __name__ == "__main__":
    main()
