"""LeNet-5 learns the digits, and is tested on digits that it was not trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from model_repo import cards, digits, weights
from model_repo.architectures.registry import create
from model_repo.weights import Weights
from server.images.decode import decode, from_pixels

CARD = cards.load("lenet5")


@pytest.fixture(scope="module")
def trained() -> Weights:
    return weights.load(CARD)


def accuracy(network: nn.Module, images: NDArray[np.uint8]) -> float:
    """On all held-out digits, given as [N, 32, 32]."""
    pixels = torch.from_numpy(images).unsqueeze(1).float() / 255
    with torch.inference_mode():
        predicted = network((pixels - CARD.mean[0]) / CARD.std[0]).argmax(1).numpy()
    return float((predicted == digits.held_out()[1]).mean())


def resized_by_server(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, 8, 8] -> [N, 32, 32]."""
    return np.stack([from_pixels(i.tobytes(), 8, 8, 1, CARD.input)[..., 0] for i in images])


def test_lenet5_recognises_the_held_out_digits(trained: Weights) -> None:
    measured = accuracy(trained.network, resized_by_server(digits.held_out()[0]))
    assert measured >= 0.985
    assert trained.note == f"{measured:.2%} of 355 held-out digits"


def test_a_network_trained_on_digits_is_marked_as_trained_and_in_eval_mode(
    trained: Weights,
) -> None:
    assert (trained.source, trained.trained, len(trained.sha256)) == ("digits", True, 64)
    assert not trained.network.training


@pytest.mark.parametrize("method", ["NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"])
def test_digits_enlarged_by_a_client_are_recognised(trained: Weights, method: str) -> None:
    images, _ = digits.held_out()
    larger = [
        np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling[method]))
        for image in images
    ]
    assert accuracy(trained.network, np.stack(larger)) >= 0.975


def test_digits_scaled_by_15_or_16_are_recognised(trained: Weights) -> None:
    images, _ = digits.held_out()
    levels = np.rint(images / 255 * 16)
    for scale in (15, 16):
        scaled = np.minimum(levels * scale, 255).astype(np.uint8)
        assert accuracy(trained.network, resized_by_server(scaled)) >= 0.975


def test_a_fifth_of_each_digit_is_held_out() -> None:
    images, labels = digits.held_out()
    assert images.shape == (355, 8, 8)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert set(np.bincount(labels)) <= {34, 35, 36}


def test_training_does_not_depend_on_the_global_seed_or_the_number_of_threads() -> None:
    def train_once(seed: int, threads: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            network = create("lenet5")
            digits.train(network, CARD.input, CARD.mean[0], CARD.std[0], epochs=1)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return list(network.state_dict().values())

    assert all(map(torch.equal, train_once(1, 1), train_once(2, 2)))


def test_progress_counts_the_epochs() -> None:
    calls: list[tuple[int, int]] = []
    result = digits.train(
        create("lenet5"),
        CARD.input,
        0.3,
        0.35,
        lambda done, total: calls.append((done, total)),
        epochs=2,
    )
    assert result.held_out == 355
    assert 0.1 < result.accuracy == result.correct / 355 < 1
    assert calls == [(1, 2), (2, 2)]


def test_every_held_out_digit_is_written_as_an_image(tmp_path: Path) -> None:
    images, labels = digits.held_out()
    folder = tmp_path / "new" / "digits"
    assert digits.write_held_out(folder) == 355
    files = sorted(folder.iterdir())
    assert [int(path.stem.split("-")[1]) for path in files] == labels.tolist()
    for path, expected in zip(files, resized_by_server(images), strict=True):
        assert np.array_equal(decode(path.read_bytes(), CARD.input)[..., 0], expected)
