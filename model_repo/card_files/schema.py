"""The keys of a card and their types.

`CardFile` is a complete card. `SCHEMA` is the same with every key optional, for a card that takes
the other keys from its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType


class InputTable(Struct, frozen=True, forbid_unknown_fields=True):
    height: int
    width: int
    channels: int
    resize: int | str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    channel_order: str = "rgb"
    antialias: bool = True
    fill: int | tuple[int, ...] = 0


class BatchTable(Struct, frozen=True, forbid_unknown_fields=True):
    max_batch: int


class GpuTable(Struct, frozen=True, forbid_unknown_fields=True):
    opt_batch: int
    max_batch: int


class CardFile(Struct, frozen=True, forbid_unknown_fields=True):
    architecture: str
    weights: str
    labels: str | tuple[str, ...]
    objective_ms: float
    share: float
    input: InputTable
    batch: BatchTable
    gpu: GpuTable
    name: str = ""
    base: str = ""
    activation: str = "softmax"
    top_k: int = 0
    output: str = ""


def _partial(table: type[Struct]) -> type[Struct]:
    """The same table with every key optional."""
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(table):
        nested = isinstance(field.type, type) and issubclass(field.type, Struct)
        kind: Any = _partial(field.type) if nested else field.type
        fields.append((field.name, kind | UnsetType, UNSET))
    return msgspec.defstruct(table.__name__, fields, frozen=True, forbid_unknown_fields=True)


SCHEMA = _partial(CardFile)


def keys(table: type[Struct] = CardFile, prefix: str = "") -> Iterator[str]:
    """The names of all keys: "architecture", ..., "input.height", ..."""
    for field in msgspec.structs.fields(table):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            yield from keys(field.type, f"{field.name}.")
        else:
            yield prefix + field.name
