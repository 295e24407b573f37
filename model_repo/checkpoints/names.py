"""Translates the names of parameters from other libraries into the names of our networks.

Our names are those of torchvision. timm has the same for ResNets, but other ones for the head of
VGG. Hugging Face transformers names every ResNet layer differently. A network that was cut up with
`nn.Sequential(*network.children())` has numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

Tensors = Mapping[str, Tensor]

# Parts that wrappers insert anywhere in a name: torch.compile, FSDP, activation checkpointing.
INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Buffers that tools add to a network, and that change no answer: averaging, counting operations.
HARMLESS = frozenset({"n_averaged", "total_ops", "total_params", "num_batches_tracked"})


def unwrapped(name: str) -> str:
    """The name without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def without_masks(tensors: Tensors) -> dict[str, Tensor]:
    """The parameters that torch.nn.utils.prune keeps in two tensors, multiplied."""
    merged = dict(tensors)
    for name in tensors:
        whole = name.removesuffix("_mask")
        original = f"{whole}_orig"
        if name != whole and original in merged and merged[original].shape == merged[name].shape:
            merged[whole] = merged.pop(original) * merged.pop(name)
    return merged


def is_harmless(name: str) -> bool:
    return name.rpartition(".")[2] in HARMLESS


def _unchanged(tensors: Tensors) -> dict[str, Tensor]:
    return dict(tensors)


TRANSFORMERS_STEM = {
    "embedder.embedder.convolution.": "conv1.",
    "embedder.embedder.normalization.": "bn1.",
}
TRANSFORMERS_LAYER = re.compile(
    r"encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
    r"(layer\.(?P<layer>\d+)|shortcut)\.(?P<kind>convolution|normalization)\."
)


def _transformers_resnet(tensors: Tensors) -> dict[str, Tensor]:
    return {_transformers_name(name): tensor for name, tensor in tensors.items()}


def _transformers_name(name: str) -> str:
    for theirs, ours in TRANSFORMERS_STEM.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = TRANSFORMERS_LAYER.match(name)
    if match is None:
        return name
    block = f"layer{int(match['stage']) + 1}.{match['block']}."  # our stages start at 1
    is_convolution = match["kind"] == "convolution"
    if match["layer"] is None:
        part = f"downsample.{0 if is_convolution else 1}."
    else:
        part = f"{'conv' if is_convolution else 'bn'}{int(match['layer']) + 1}."
    return block + part + name[match.end() :]


# timm keeps the dense layers of VGG as convolutions over the last feature map.
TIMM_VGG = {
    "pre_logits.fc1.": "classifier.0.",
    "pre_logits.fc2.": "classifier.3.",
    "head.fc.": "classifier.6.",
}


def _timm_vgg(tensors: Tensors) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in TIMM_VGG.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor
        renamed[name] = tensor
    return renamed


RESNET_CHILDREN = {  # of torchvision's ResNet; 2 is ReLU, 3 the pool, 8 the average pool
    **{"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"},
    "9": "fc",
}


def _resnet_children(tensors: Tensors) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        number, dot, rest = name.partition(".")
        renamed[RESNET_CHILDREN.get(number, number) + dot + rest] = tensor
    return renamed


# Whose names they are, how the first parameter is called, and the translation.
STYLES: tuple[tuple[str, str, Callable[[Tensors], dict[str, Tensor]]], ...] = (
    ("", "", _unchanged),
    ("transformers", "embedder.embedder.convolution.weight", _transformers_resnet),
    ("timm", "features.0.weight", _timm_vgg),
    ("nn.Sequential", "0.weight", _resnet_children),
)


def prefixes(names: Iterable[str], first: str) -> list[str]:
    """What stands before the name `first` in the names: "", "module.", "model.backbone.", ..."""
    found: dict[str, None] = {}
    for name in names:
        if name == first or name.endswith(f".{first}"):
            found[name.removesuffix(first)] = None
    return list(found)
