"""Every network is recognised by its names and shapes, whichever library wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model_repo.architectures.registry import architecture_names, create
from model_repo.checkpoints.recognition import recognise
from model_repo.checkpoints.states import StateDict

# Names and shapes that torchvision, timm 1.0 and transformers 5 give their networks.
FILES = Path(__file__).parent.parent
PUBLIC = sorted((FILES / "public_checkpoints").glob("*.json"))
FOREIGN = sorted((FILES / "foreign_checkpoints").glob("*.json"))


def states(shapes: dict[str, list[int]]) -> list[StateDict]:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return [StateDict((), tensors, ())]


@pytest.mark.parametrize("name", architecture_names())
def test_every_network_of_ours_is_recognised(name: str) -> None:
    with torch.device("meta"):
        state = create(name, 7).state_dict()
    found = recognise([StateDict((), dict(state), ())])
    assert found is not None
    assert (found.network.architecture, found.classes) == (name, 7)
    assert (found.likeness, found.unknown()) == (1, [])


@pytest.mark.parametrize("path", [*PUBLIC, *FOREIGN], ids=lambda path: path.stem)
def test_names_of_other_libraries_are_recognised_completely(path: Path) -> None:
    found = recognise(states(json.loads(path.read_text())))
    assert found is not None
    assert found.network.architecture == path.stem.rpartition("_")[2]
    assert found.classes == 1000
    assert (found.likeness, found.unknown()) == (1, [])
    expected = found.network.shapes
    head = f"{found.network.head}."
    for name, shape in expected.items():
        assert name.startswith(head) or found.tensors[name].shape == shape


def test_a_network_with_other_widths_is_not_recognised() -> None:
    shapes = json.loads((FILES / "public_checkpoints" / "resnet50.json").read_text())
    wide = {
        name: [2 * size for size in shape] if ".conv" in name else shape
        for name, shape in shapes.items()
    }
    assert recognise(states(wide)) is None
    assert recognise(states({"a.weight": [3, 3]})) is None
