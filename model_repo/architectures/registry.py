"""Registers the networks by name.

Each file in this folder holds the networks of one paper. Functions marked `@architecture` are found
without further registration; model cards refer to them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from model_repo import architectures

Build = Callable[[int], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network without parameters."""

    name: str
    build: Build  # classes -> the served network: [N, C, H, W] -> logits [N, classes]
    input_shape: tuple[int, int, int]  # C, H, W that the paper trains on
    classes: int  # as in the paper
    min_side: int = 0  # smallest height and width of other sizes; 0: only the paper's size fits
    training: Build | None = None  # the network with its auxiliary classifiers, if it has any
    training_only: tuple[str, ...] = ()  # prefixes of the parameters that only `training` has

    def __post_init__(self) -> None:
        if (self.training is None) != (not self.training_only):
            raise ValueError(f"{self.name}: training and training_only must be given together")

    def why_not(self, channels: int, height: int, width: int) -> str:
        """Why the network cannot take images of this size. Empty if it can.

        The text continues a sentence: "input of lenet5 " + "must be 32x32x1, not 28x28x1".
        """
        own_channels, own_height, own_width = self.input_shape
        given = f"{height}x{width}x{channels}"
        if not self.min_side and (channels, height, width) != self.input_shape:
            return f"must be {own_height}x{own_width}x{own_channels}, not {given}"
        if channels != own_channels:
            return f"must have {own_channels} channels, not {channels}"
        if min(height, width) < self.min_side:
            return f"must be at least {self.min_side}x{self.min_side} pixels, not {height}x{width}"
        return ""


_registered: dict[str, Architecture] = {}


def architecture(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    min_side: int = 0,
    training: Build | None = None,
    training_only: tuple[str, ...] = (),
) -> Callable[[Build], Build]:
    """Registers a function under its own name. Raises ValueError if the name is taken."""

    def register(build: Build) -> Build:
        name = build.__name__
        if name in _registered:
            first = _registered[name].build.__module__
            raise ValueError(f"architecture {name!r} is already registered, by {first}")
        _registered[name] = Architecture(
            name=name,
            build=build,
            input_shape=input_shape,
            classes=classes,
            min_side=min_side,
            training=training,
            training_only=training_only,
        )
        return build

    return register


def architecture_names() -> list[str]:
    """Every registered name, sorted."""
    _import_papers()
    return sorted(_registered)


def find(name: str) -> Architecture:
    """The architecture of that name. Raises ValueError for an unknown one."""
    _import_papers()
    if name not in _registered:
        raise ValueError(
            f"architecture {name!r} is unknown; choose one of {', '.join(architecture_names())}"
        )
    return _registered[name]


def create(name: str, classes: int | None = None, *, auxiliary: bool = False) -> nn.Module:
    """A new network in training mode, with torch's default parameters.

    `classes` defaults to the paper's number. With `auxiliary`, the network also has the auxiliary
    classifiers that the paper trains with. Raises ValueError for an unknown name, for fewer than
    one class, and for `auxiliary` if the paper has no auxiliary classifiers.
    """
    found = find(name)
    count = found.classes if classes is None else classes
    if count < 1:
        raise ValueError(f"{name} needs at least 1 class, not {count}")
    if not auxiliary:
        return found.build(count)
    if found.training is None:
        raise ValueError(f"{name} has no auxiliary classifiers")
    return found.training(count)


@cache
def _import_papers() -> None:
    """Imports the files of this folder, so that their networks are registered.

    Not done at import time, because the files import this module.
    """
    for module in iter_modules(architectures.__path__):
        import_module(f"{architectures.__name__}.{module.name}")
