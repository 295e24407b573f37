"""Fits the tensors of a checkpoint to a network: which of them are its parameters?

A checkpoint may hold several sets of parameters, under any prefix and under the names of other
libraries. The set that matches best is taken; averaged parameters win over others that match
equally. Nothing is guessed: in the end every parameter of the network has exactly one tensor of its
shape, and no tensor of the network's own is left over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from model_repo.architectures.registry import create, find
from model_repo.checkpoints.names import (
    STYLES,
    Tensors,
    is_harmless,
    prefixes,
    unwrapped,
    without_masks,
)
from model_repo.checkpoints.states import StateDict, is_averaged

BATCH_COUNTER = ".num_batches_tracked"
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShapes:
    """The parameters and buffers of a network by name, without values."""

    architecture: str
    shapes: Shapes
    head: str  # the last layer: "fc"; its first dimension is the number of classes
    training_only: tuple[str, ...]  # prefixes of parameters that only training needs

    @property
    def features(self) -> int:
        return self.shapes[f"{self.head}.weight"][1]

    def counted(self) -> list[str]:
        """The names of what makes the network recognisable."""
        return [
            name
            for name in self.shapes
            if not name.endswith(BATCH_COUNTER) and not name.startswith(f"{self.head}.")
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Tensors of a checkpoint, under the names of a network."""

    network: NetworkShapes
    state: StateDict  # where they were
    prefix: str
    style: str  # whose names they had: "timm", ... or "" for ours
    tensors: dict[str, Tensor]  # by our names, also those that the network does not have
    outside: tuple[str, ...]  # names without the prefix

    @property
    def matched(self) -> int:
        """How many parameters before the head have a tensor of their shape."""
        shapes = self.network.shapes
        return sum(
            name in self.tensors and self.tensors[name].shape == shapes[name]
            for name in self.network.counted()
        )

    @property
    def likeness(self) -> float:
        """1 if the tensors are the network's, all of them and no others; at least 0."""
        unknown = [name for name in self.unknown() if not name.startswith(f"{self.network.head}.")]
        return self.matched / max(1, len(self.network.counted()) + len(unknown))

    @property
    def classes(self) -> int | None:
        """The rows of the last layer. None if there is none."""
        weight = self.tensors.get(f"{self.network.head}.weight")
        if weight is None or weight.dim() != 2 or weight.shape[1] != self.network.features:
            return None
        return int(weight.shape[0])

    def unknown(self) -> list[str]:
        """Names below the prefix that the network does not have."""
        return [
            name
            for name in self.tensors
            if name not in self.network.shapes
            and not name.startswith(self.network.training_only or ("\0",))
            and not is_harmless(name)
        ]

    @property
    def is_averaged(self) -> bool:
        return self.state.is_averaged or is_averaged(self.prefix)


@cache
def network_shapes(architecture: str) -> NetworkShapes:
    """The shapes of a network with one class."""
    with torch.device("meta"):
        network = create(architecture, 1)
    *_, head = (name for name, each in network.named_modules() if isinstance(each, nn.Linear))
    return NetworkShapes(
        architecture=architecture,
        shapes={name: tensor.shape for name, tensor in network.state_dict().items()},
        head=head,
        training_only=find(architecture).training_only,
    )


def best_fit(states: Sequence[StateDict], architecture: str) -> Fit | None:
    """The set of tensors that is most like the network. None if there are no tensors."""
    network = network_shapes(architecture)
    fits = [fit for state in states for fit in _fits(state, network)]
    # max keeps the first one of those that are equal.
    return max(fits, key=lambda fit: (fit.matched, fit.is_averaged, fit.likeness), default=None)


def _fits(state: StateDict, network: NetworkShapes) -> Iterator[Fit]:
    names = without_masks({unwrapped(name): each for name, each in state.tensors.items()})
    first = next(iter(network.shapes))
    for style, anchor, translate in STYLES:
        for prefix in prefixes(names, anchor or first) or ([""] if not style else []):
            yield _fit(state, names, network, prefix, style, translate)


def _fit(
    state: StateDict,
    names: Tensors,
    network: NetworkShapes,
    prefix: str,
    style: str,
    translate: Callable[[Tensors], dict[str, Tensor]],
) -> Fit:
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in names.items()
        if name.startswith(prefix)
    }
    outside = {name: tensor for name, tensor in names.items() if not name.startswith(prefix)}
    tensors = translate(inside)
    if f"{network.head}.weight" not in tensors:
        _find_head(tensors, outside, network)
    for name in network.shapes:
        if name.endswith(BATCH_COUNTER) and name not in tensors:
            tensors[name] = torch.zeros((), dtype=torch.int64)
    return Fit(
        network=network,
        state=state,
        prefix=prefix,
        style=style,
        tensors=tensors,
        outside=tuple(outside),
    )


def _find_head(
    tensors: dict[str, Tensor], outside: dict[str, Tensor], network: NetworkShapes
) -> None:
    """Gives the last layer its name if it has another one, or lies outside of the prefix.

    It must be the only dense layer that is left, and nothing else may be left beside it. Dropout,
    which has no parameters, may stand before it: "fc.1.weight".
    """
    for place in (tensors, outside):
        own = [name for name in place if place is outside or name not in network.shapes]
        own = [name for name in own if not name.startswith(network.training_only or ("\0",))]
        layers = [
            name.removesuffix(".weight")
            for name in own
            if name.endswith(".weight")
            and place[name].dim() == 2
            and place[name].shape[1] == network.features
        ]
        if len(layers) != 1:
            continue
        (layer,) = layers
        beside = [name for name in own if _root(name) == _root(layer) and not is_harmless(name)]
        if sorted(beside) == sorted([f"{layer}.weight", f"{layer}.bias"]):
            for part in ("weight", "bias"):
                tensors[f"{network.head}.{part}"] = place.pop(f"{layer}.{part}")
            return


def _root(name: str) -> str:
    return name.partition(".")[0]
