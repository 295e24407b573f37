"""ONNX files and a user's own code, from a card to answers of the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model_repo.pipeline import BuildError, BuildOptions, build
from server.engines.base import backend, infer
from server.process.cores import available_cores
from server.repository import reader
from tests.model_repo.onnx_import.graphs import classifier, save

INPUT = """
labels = ["a", "b", "c", "d"]
[input]
height = 12
width = 10
channels = 3
resize = "exact"
interpolation = "bilinear"
mean = [0.4, 0.5, 0.6]
std = [0.2, 0.3, 0.25]
"""
CODE = """
from torch import nn
from parts import WIDTH

def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(WIDTH, classes),
    )

def broken(classes):
    return nn.Linear(classes, unknown)
"""


def card(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text + INPUT)
    return str(path)


def options(folder: Path, *, allow_code: bool = False) -> BuildOptions:
    return BuildOptions(repo=folder / "repo", precision="fp32", allow_code=allow_code)


@pytest.mark.parametrize(
    ("pooling", "max_batch"), [("Reshape", 8), ("over the batch", 1)], ids=["batched", "batch of 1"]
)
def test_an_onnx_file_is_built_and_says_what_it_is(
    tmp_path: Path, pooling: str, max_batch: int
) -> None:
    save(classifier(batch=1, pooling=pooling, opset=13), tmp_path)  # type: ignore[arg-type]
    manifest = build(card(tmp_path, 'architecture = "net.onnx"'), options(tmp_path)).manifest
    (record,) = manifest.engines
    assert (manifest.architecture, manifest.classes, manifest.top_k) == ("onnx", 4, 4)
    assert (record.max_batch, manifest.weights.trained) == (max_batch, True)
    folder = tmp_path / "repo" / "own" / "1"
    golden = reader.open_version(folder, manifest).golden
    compiler = backend("openvino")
    engine = compiler.load(folder, record, (12, 10, 3), threads=available_cores())
    try:
        answer = infer(engine.instances[0], golden.pixels[:1])
    finally:
        engine.close()
    np.testing.assert_allclose(answer.probabilities, golden.probabilities[:1], atol=1e-4)


def own_network(folder: Path) -> str:
    (folder / "net.py").write_text(CODE)
    (folder / "parts.py").write_text("WIDTH = 6\n")
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 4),
    )
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, folder / "net.pth")
    return 'architecture = "net.py:build"\nweights = "net.pth"'


def test_a_users_own_code_runs_only_if_it_is_allowed(tmp_path: Path) -> None:
    path = card(tmp_path, own_network(tmp_path))
    with pytest.raises(BuildError, match=r"net\.py:build is Python code; build with --allow-code"):
        build(path, options(tmp_path))
    manifest = build(path, options(tmp_path, allow_code=True)).manifest
    assert (manifest.architecture, manifest.parameters) == ("python", 6 * 28 + 4 * 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("build", "broken"), r"broken\(4\) fails: NameError.*line 1\d: return nn.Linear"),
        (("build", "other"), r"has no function 'other'; it has build, broken"),
        (("net.py:build", "none.py:build"), "does not exist"),
        (("net.pth", "random:0"), ""),
    ],
    ids=["fails", "no function", "no file", "random"],
)
def test_what_is_wrong_with_own_code_is_explained(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = own_network(tmp_path).replace(*change)
    if not message:
        manifest = build(card(tmp_path, text), options(tmp_path, allow_code=True)).manifest
        assert not manifest.weights.trained
        return
    with pytest.raises(BuildError, match=message):
        build(card(tmp_path, text), options(tmp_path, allow_code=True))


def test_a_checkpoint_of_another_network_is_explained(tmp_path: Path) -> None:
    text = own_network(tmp_path)
    torch.save(
        {"0.weight": torch.zeros(6, 3, 5, 5), "9.bias": torch.zeros(2)}, tmp_path / "net.pth"
    )
    with pytest.raises(BuildError, match=r"1 unknown \(9\.bias\); 1 of another shape \(0\.weight"):
        build(card(tmp_path, text), options(tmp_path, allow_code=True))
