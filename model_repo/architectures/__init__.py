"""The networks by name: one file a paper, registered by decorator.

A file put into this folder is found by itself; its functions marked `@architecture` become names
that `create` and the model cards may use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from torch import nn

Build = Callable[[int], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network before it has parameters."""

    name: str
    build: Build  # classes -> the network as it is served: [N, C, H, W] -> logits [N, classes]
    input_shape: tuple[int, int, int]  # C, H, W that the paper trains on
    classes: int  # as in the paper
    training: Build | None = None  # the network with its auxiliary classifiers, where it has some
    training_only: tuple[str, ...] = ()  # prefixes of the parameters that only `training` has

    def __post_init__(self) -> None:
        if (self.training is None) != (not self.training_only):
            raise ValueError(
                f"{self.name}: training and training_only are given together or not at all"
            )


_registered: dict[str, Architecture] = {}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_registered)


def architecture(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    training: Build | None = None,
    training_only: tuple[str, ...] = (),
) -> Callable[[Build], Build]:
    """Registers a function under its own name. Raises ValueError when the name is taken."""

    def register(build: Build) -> Build:
        name = build.__name__
        if name in _registered:
            first = _registered[name].build.__module__
            raise ValueError(f"architecture {name!r} is registered already, by {first}")
        _registered[name] = Architecture(
            name=name,
            build=build,
            input_shape=input_shape,
            classes=classes,
            training=training,
            training_only=training_only,
        )
        return build

    return register


def architecture_names() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_registered)


def find(name: str) -> Architecture:
    """The architecture of that name. Raises ValueError naming those there are."""
    if name not in _registered:
        raise ValueError(
            f"architecture {name!r} is unknown; there are {', '.join(architecture_names())}"
        )
    return _registered[name]


def create(name: str, classes: int | None = None, *, auxiliary: bool = False) -> nn.Module:
    """A new network in training mode, its parameters drawn by torch's defaults.

    `classes` defaults to the paper's. With `auxiliary` it is the network as it is trained, whose
    result names its parts. Raises ValueError for an unknown name, fewer than one class, or
    `auxiliary` where the paper has no auxiliary classifiers.
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


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
