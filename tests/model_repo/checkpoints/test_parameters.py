"""The parameters of a network are found in whatever a training script saved around them."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_repo.architectures.registry import create
from model_repo.checkpoints.parameters import Parameters, network_parameters
from model_repo.checkpoints.reader import WrongCheckpoint

State = dict[str, Tensor]
CLASSES = 7


def new_state(name: str = "lenet5", classes: int = CLASSES, seed: int = 1) -> State:
    torch.manual_seed(seed)
    state: State = create(name, classes).state_dict()
    for tensor in state.values():  # batch norms too differ from layer to layer
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return state


def parameters(path: Path, name: str = "lenet5", classes: int = CLASSES) -> Parameters:
    with torch.device("meta"):
        shapes = {key: each.shape for key, each in create(name, classes).state_dict().items()}
    return network_parameters(path, name, shapes)


def taken(folder: Path, content: Any, state: State, name: str = "lenet5") -> str:
    """Saves `content`, checks that exactly `state` comes out, and returns the line about it."""
    path = folder / "net.pth"
    torch.save(content, path)
    found = parameters(path, name)
    assert found.tensors.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(found.tensors[key], tensor), key
    return found.taken


def refusal(folder: Path, content: Any, name: str = "lenet5", classes: int = CLASSES) -> str:
    path = folder / "net.pth"
    torch.save(content, path)
    with pytest.raises(WrongCheckpoint) as caught:
        parameters(path, name, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


OTHER = new_state(seed=9)
OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(6, 1, 5, 5)}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (lambda s: s, "10 tensors; nothing left aside"),
        (lambda s: OrderedDict(s), "10 tensors; nothing left aside"),
        (
            lambda s: {"state_dict": s, "epoch": 3, "optimizer": OPTIMIZER},
            "10 tensors of entry 'state_dict'; left aside: epoch, optimizer",
        ),
        (lambda s: {"model": s}, "10 tensors of entry 'model'; nothing left aside"),
        (lambda s: {"model_state_dict": s}, "10 tensors of entry 'model_state_dict'; nothing"),
        (lambda s: {"net": s, "acc": 0.9}, "10 tensors of entry 'net'; left aside: acc"),
        (lambda s: {"epoch": 3, **s}, "10 tensors; left aside: epoch"),
        (lambda s: prefixed(s, "module."), "10 tensors, prefix 'module.'; nothing left aside"),
        (lambda s: prefixed(s, "_orig_mod."), "10 tensors; nothing left aside"),
        (
            lambda s: {"model": prefixed(s, "_orig_mod.module.")},
            "10 tensors of entry 'model', prefix 'module.'; nothing left aside",
        ),
        (
            lambda s: {"checkpoint": {"model": prefixed(s, "module._orig_mod.")}, "step": 1},
            "10 tensors of entry 'checkpoint.model', prefix 'module.'; left aside: step",
        ),
        (
            lambda s: {
                "state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(7)},
                "callbacks": {},
            },
            "10 tensors of entry 'state_dict', prefix 'model.'; left aside: callbacks, loss",
        ),
        (
            lambda s: {"state_dict": prefixed(s, "net.backbone.")},
            "10 tensors of entry 'state_dict', prefix 'net.backbone.'; nothing left aside",
        ),
        (
            lambda s: {"model": OTHER, "model_ema": prefixed(s, "module.") | {"n_averaged": 3}},
            "10 tensors of entry 'model_ema' (averaged over the training), prefix 'module.'; "
            "left aside: model",
        ),
        (
            lambda s: {"ema": s, "model": OTHER},
            "10 tensors of entry 'ema' (averaged over the training); left aside: model",
        ),
        (
            lambda s: {"state_dict": prefixed(OTHER, "model.") | prefixed(s, "ema_model.")},
            "10 tensors of entry 'state_dict' (averaged over the training), prefix 'ema_model.'; "
            "left aside: model",
        ),
        (lambda s: {k: v.numpy() for k, v in s.items()}, "10 tensors; nothing left aside"),
        (lambda s: {k: nn.Parameter(v) for k, v in s.items()}, "10 tensors; nothing left aside"),
        (lambda s: s | {"total_ops": torch.zeros(1)}, "10 tensors; left aside: total_ops"),
    ],
)
def test_the_usual_wrappers_are_opened_and_the_rest_is_named(
    tmp_path: Path, wrap: Callable[[State], Any], line: str
) -> None:
    state = new_state()
    assert taken(tmp_path, wrap(state), state).startswith(line)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_number_format_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype).float() for name, tensor in new_state().items()}
    torch.save({"model": {k: v.to(dtype) for k, v in state.items()}}, tmp_path / "net.pth")
    found = parameters(tmp_path / "net.pth").tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_pruned_parameters_are_multiplied_by_their_masks(tmp_path: Path) -> None:
    state = new_state()
    mask = (state["0.weight"] > 1).float()
    pruned = {name: tensor for name, tensor in state.items() if name != "0.weight"}
    pruned |= {"0.weight_orig": state["0.weight"], "0.weight_mask": mask}
    taken(tmp_path, pruned, state | {"0.weight": state["0.weight"] * mask})


# --- a new head ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("11.", "11.1."),  # Sequential(Dropout, Linear) instead of the last layer
        ("11.", "head."),
        ("11.", "classifier.0."),
    ],
)
def test_the_only_dense_layer_that_is_left_is_the_head(tmp_path: Path, old: str, new: str) -> None:
    state = new_state()
    renamed = {name.replace(old, new): tensor for name, tensor in state.items()}
    assert taken(tmp_path, renamed, state) == "10 tensors; nothing left aside"
    outside = {
        name if name.startswith(new) else f"backbone.{name}": tensor
        for name, tensor in renamed.items()
    }
    line = taken(tmp_path, outside, state)
    assert line == "10 tensors, prefix 'backbone.'; nothing left aside"


def test_a_head_of_several_layers_is_refused(tmp_path: Path) -> None:
    state = new_state()
    del state["11.weight"], state["11.bias"]
    state |= {
        "11.0.weight": torch.ones(20, 84),
        "11.0.bias": torch.ones(20),
        "11.3.weight": torch.ones(7, 20),
        "11.3.bias": torch.ones(7),
    }
    assert refusal(tmp_path, state) == (
        "does not fit lenet5 with 7 classes: 2 missing (11.weight, 11.bias); "
        "4 unknown (11.0.weight, 11.0.bias, 11.3.weight, ...)"
    )


# --- names of other libraries ----------------------------------------------------------------


def transformers_names(state: State) -> State:
    """ResNet's names in Hugging Face transformers."""
    rules = (
        (r"^conv1\.", "resnet.embedder.embedder.convolution."),
        (r"^bn1\.", "resnet.embedder.embedder.normalization."),
        (r"^fc\.", "classifier.1."),
        (r"\.conv(\d)\.", r".layer.\1.convolution."),
        (r"\.bn(\d)\.", r".layer.\1.normalization."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        name = re.sub(r"\.layer\.(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.", name)
        name = re.sub(
            r"^layer(\d)\.(\d+)\.",
            lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
            name,
        )
        renamed[name] = tensor
    return renamed


def children_names(state: State) -> State:
    """A ResNet without its last layer, as nn.Sequential, with a new one."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        known = first in numbers
        renamed[f"features.{numbers[first]}.{rest}" if known else f"head.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize(
    ("rename", "line"),
    [
        (transformers_names, "prefix 'resnet.', names of transformers; nothing left aside"),
        (children_names, "prefix 'features.', names of nn.Sequential; nothing left aside"),
    ],
)
def test_names_of_other_libraries_are_translated(
    tmp_path: Path, rename: Callable[[State], State], line: str
) -> None:
    state = new_state("resnet18")
    assert taken(tmp_path, rename(state), state, "resnet18") == f"122 tensors, {line}"


# --- several files ---------------------------------------------------------------------------


def sharded(folder: Path, state: State) -> Path:
    names = list(state)
    parts = {f"net-0000{n}-of-00002.safetensors": names[4 * n - 4 : 12 * n - 8] for n in (1, 2)}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    files = {name: file for file, own in parts.items() for name in own}
    path = folder / "net.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return path


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    state = new_state()
    found = parameters(sharded(tmp_path, state))
    assert all(torch.equal(found.tensors[name], state[name]) for name in state)


def test_a_single_part_and_a_missing_part_are_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, new_state())
    part = tmp_path / "net-00002-of-00002.safetensors"
    with pytest.raises(WrongCheckpoint, match="it is one file of several; give their index"):
        parameters(part)
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(WrongCheckpoint, match="has a part net-00002-of-00002.safetensors that "):
        parameters(index)
    part.unlink()
    with pytest.raises(WrongCheckpoint, match="is the index of 2 files, but 1 of them cannot be"):
        parameters(index)
    index.write_text('{"weight_map": {"a": "../net.pth"}}')
    with pytest.raises(WrongCheckpoint, match="lists the file '../net.pth', which is not beside"):
        parameters(index)


# --- refusals --------------------------------------------------------------------------------


def test_other_classes_than_the_labels_are_counted(tmp_path: Path) -> None:
    assert refusal(tmp_path, new_state(classes=7), classes=10) == (
        "has 7 classes, but the labels name 10; give a label file with 7 names in the order of "
        "the training"
    )


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": prefixed(s, "module.")}])
def test_a_checkpoint_of_another_network_of_ours_is_recognised(
    tmp_path: Path, wrap: Callable[[State], Any]
) -> None:
    state = wrap(new_state("resnet18", 3))
    assert refusal(tmp_path, state, "resnet50") == (
        "does not fit resnet50 with 7 classes: it looks like resnet18 with 3 classes; "
        'use base = "resnet18" (or --base resnet18)'
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cls_token", "blocks.0.attn.qkv.weight"], "it looks like a vision transformer, which is"),
        (["features.denseblock1.denselayer1.conv1.weight"], "it looks like a DenseNet, which is"),
        (["encoder.a", "encoder.b"], "it looks like none of ours; its names begin with encoder.a"),
    ],
)
def test_a_checkpoint_of_none_of_our_networks_is_described(
    tmp_path: Path, names: list[str], words: str
) -> None:
    message = refusal(tmp_path, {name: torch.zeros(3, 3) for name in names})
    assert message.startswith(f"does not fit lenet5 with 7 classes: {words}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.to_sparse(), "1 sparse, complex, quantised or without values (3.bias)"),
        (lambda t: t.to(torch.complex64), "1 sparse, complex, quantised or without values"),
        (lambda t: t * float("nan"), "1 with numbers that are not finite (3.bias)"),
        (lambda t: t[:3], "1 of another shape (3.bias [3] for [16])"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(
    tmp_path: Path, spoil: Callable[[Tensor], Tensor], words: str
) -> None:
    state = new_state()
    state["3.bias"] = spoil(state["3.bias"])
    assert refusal(tmp_path, {"model": state}).startswith(
        f"does not fit lenet5 with 7 classes: {words}"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "contains a value of type Tensor, not tensors by name; save the param"),
        ([torch.zeros(3)], "contains a value of type list, not tensors by name; save the param"),
        ({}, "contains no tensors by name; save the parameters with"),
        ({"epoch": 3}, "contains no tensors by name but 'epoch'; save the parameters with"),
        ({1: torch.zeros(3)}, "contains no tensors by name but 1; save the parameters with"),
    ],
)
def test_content_without_tensors_by_name_is_described(
    tmp_path: Path, content: object, words: str
) -> None:
    assert refusal(tmp_path, content).startswith(words)
