"""Finds the tensors by name in what a training script saved.

A script wraps them in "state_dict", "model", "net" or another entry, beside its epoch, optimizer
and options, and perhaps a second time with averaged parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH = 4
AVERAGED = ("ema", "avg", "averaged", "swa", "shadow")


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name, and where they were."""

    entries: tuple[str, ...]  # from the outside to the inside: ("model",)
    tensors: dict[str, Tensor]
    others: tuple[str, ...]  # names beside the tensors that hold something else

    @property
    def title(self) -> str:
        """ "entry 'model'" or "" for the whole file."""
        return f"entry {'.'.join(self.entries)!r}" if self.entries else ""

    @property
    def is_averaged(self) -> bool:
        return any(is_averaged(entry) for entry in self.entries)


def is_averaged(name: str) -> bool:
    """Whether a name says that parameters are averages over the training."""
    words = name.lower().replace("-", "_").replace(".", "_").split("_")
    return any(word in AVERAGED for word in words)


def find_states(content: object) -> list[StateDict]:
    """All places in the content that hold tensors by name, in the order of the file."""
    return list(_walk(content, ()))


def top_entries(content: object) -> list[str]:
    """The names at the outside of the content."""
    return [str(name) for name in content] if isinstance(content, Mapping) else []


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor holds real numbers, one after the other."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_complex()
        and not tensor.is_quantized
        and not tensor.is_meta
    )


def _walk(content: object, entries: tuple[str, ...]) -> Iterator[StateDict]:
    if not isinstance(content, Mapping) or len(entries) > MAX_DEPTH:
        return
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for name, value in content.items():
        tensor = _tensor(value)
        if tensor is not None and isinstance(name, str):
            tensors[name] = tensor
        else:
            others.append(str(name))
    if tensors:
        yield StateDict(entries, tensors, tuple(others))
    for name, value in content.items():
        if isinstance(name, str):
            yield from _walk(value, (*entries, name))


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.dtype.isnative:
        return torch.from_numpy(np.ascontiguousarray(value))
    return None
