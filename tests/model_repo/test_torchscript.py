"""TorchScript programs are served as whole networks, if the user allows their code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_repo.architectures.registry import create
from model_repo.pipeline import BuildError, BuildOptions, build
from server.engines.base import backend, infer
from server.process.cores import available_cores
from server.repository import reader

INPUT = (
    "[input]\nheight = 40\nwidth = 36\nchannels = 3\nresize = 44\ninterpolation = 'bilinear'\n"
    "mean = [0.4, 0.5, 0.6]\nstd = [0.2, 0.3, 0.4]\n"
)


class Own(nn.Module):
    """A network that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.dense = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.conv(x)))
        out: Tensor = self.dense(x.mean(dim=[2, 3]) * 4)
        return out


def write(folder: Path, network: nn.Module, card: str, *, traced: bool = False) -> str:
    """Saves the program and a card; returns the card's path."""
    images = torch.zeros(2, *(1, 32, 32) if "lenet5" in card else (3, 40, 36))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # people have such files
        jit: Any = torch.jit
        program = jit.trace(network, images) if traced else jit.script(network)
        program.save(str(folder / "net.pt"))
    (folder / "food.toml").write_text(f'labels = ["bread", "rice", "soup"]\n{card}')
    return str(folder / "food.toml")


@pytest.mark.parametrize("traced", [False, True])
def test_a_program_of_an_unknown_network_is_served_as_it_is(tmp_path: Path, traced: bool) -> None:
    torch.manual_seed(0)
    network = Own().eval()
    network.norm.running_mean = torch.randn(8) / 10
    path = write(tmp_path, network, f'architecture = "net.pt"\n{INPUT}', traced=traced)
    options = BuildOptions(repo=tmp_path / "repo", precision="fp32", allow_code=True)
    manifest = build(path, options).manifest
    assert (manifest.architecture, manifest.weights.trained) == ("torchscript", True)
    assert manifest.parameters == sum(each.numel() for each in network.parameters())
    assert manifest.weights.note == "net.pt: a TorchScript program, served as it is"
    folder = tmp_path / "repo" / "food" / "1"
    pixels = reader.open_version(folder).golden.pixels
    normalised = (torch.tensor(pixels) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor(
        [0.2, 0.3, 0.4]
    )
    with torch.inference_mode():
        expected = network(normalised.permute(0, 3, 1, 2)).softmax(1).numpy()
    engine = backend("openvino").load(
        folder, manifest.engines[0], pixels.shape[1:], threads=available_cores()
    )
    for rows in (1, 3):
        answer = infer(engine.instances[0], pixels[:rows])
        np.testing.assert_allclose(answer.probabilities, expected[:rows], atol=1e-4)
    engine.close()


def test_a_program_that_computes_the_same_as_one_of_ours_becomes_that_network(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    network = create("lenet5", 3).eval()
    path = write(tmp_path, network, 'base = "lenet5"\nweights = "net.pt"\n')
    options = BuildOptions(repo=tmp_path / "repo", backend="openvino", allow_code=True)
    manifest = build(path, options).manifest
    assert manifest.architecture == "lenet5"
    assert manifest.weights.note == "net.pt: a TorchScript program that computes the same as lenet5"


def test_a_program_needs_permission_and_a_right_number_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path, Own(), f'architecture = "net.pt"\n{INPUT}')
    with pytest.raises(BuildError, match=r"net\.pt is a TorchScript program, which is code; build"):
        build(path, BuildOptions(repo=tmp_path / "repo"))
    wrong = (tmp_path / "food.toml").read_text().replace(', "soup"', "")
    (tmp_path / "food.toml").write_text(wrong)
    with pytest.raises(BuildError, match=r"net\.pt has 3 classes, but the labels name 2$"):
        build(path, BuildOptions(repo=tmp_path / "repo", allow_code=True))
    torch.save(Own().state_dict(), tmp_path / "net.pt")
    with pytest.raises(BuildError, match=r"net\.pt is not a TorchScript program; name its arch"):
        build(path, BuildOptions(repo=tmp_path / "repo", allow_code=True))


class Several(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :3], x


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)[:, :3]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Several(), r"net\.pt returns tuple; a classifier returns \[6, classes\]"),
        (nn.Identity(), r"net\.pt returns \[6, 3, 40, 36\]; a classifier returns \[6, classes\]"),
        (Narrow(), r"net\.pt returns \[2, 3\]; a classifier returns \[6, classes\]"),
        (nn.Linear(7, 3), r"net\.pt fails with images of \[3, 40, 36\]: "),
    ],
)
def test_a_program_that_does_not_classify_is_described(
    tmp_path: Path, network: nn.Module, message: str
) -> None:
    path = write(tmp_path, network, f'architecture = "net.pt"\n{INPUT}')
    with pytest.raises(BuildError, match=message):
        build(path, BuildOptions(repo=tmp_path / "repo", allow_code=True))
