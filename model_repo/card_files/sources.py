"""Reads a card and the cards it builds on, and joins them.

A card may say only what differs from its `base`: another card, by the name of one of ours or by its
path. Paths in a card are relative to the folder of the card that says them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from model_repo.card_files.schema import SCHEMA, CardFile, keys
from server.repository.text import decode_text

MAX_BASES = 8
NETWORK_SUFFIXES = (".onnx", ".py", ".pt")  # files that can stand for an architecture
WORDS = ("digits",)  # sources of weights without a colon
# What a card of a user's own network gets if it says nothing: nothing here changes an answer.
OWN_NETWORK: dict[str, Any] = {
    "objective_ms": 100,
    "share": 1,
    "batch": {"max_batch": 8},
    "gpu": {"opt_batch": 64, "max_batch": 256},
}


@dataclass(frozen=True, slots=True)
class CardSource:
    """Where a card is: a file, or its content from the command line.

    `folder` is where its relative paths start.
    """

    title: str  # for messages: "food.toml", "the card of --name food"
    folder: Path
    content: bytes


@dataclass(frozen=True, slots=True)
class JoinedCard:
    """A card joined with its bases."""

    file: CardFile
    sha256: str  # of the card's own file, and of those of its bases if it has any
    notes: tuple[str, ...]  # what the join had to decide, for the user to know


def join(source: CardSource, find_base: Callable[[str, Path], CardSource]) -> JoinedCard:
    """The complete card. `find_base` finds a card by what `base` says and the folder of the card.

    Raises ValueError, and msgspec.ValidationError for keys and types.
    """
    table, contents, notes = _joined(source, find_base, ())
    if is_network_file(str(table.get("architecture", ""))):
        table = _over(OWN_NETWORK, table)
    digest = sha256(contents[0])
    for content in contents[1:]:
        digest.update(sha256(content).digest())
    return JoinedCard(msgspec.convert(table, CardFile), digest.hexdigest(), tuple(notes))


def is_network_file(architecture: str) -> bool:
    """Whether an architecture is a file: "net.onnx", "net.py:build"."""
    path = network_path(architecture)
    return "/" in path or path.endswith(NETWORK_SUFFIXES)


def network_path(architecture: str) -> str:
    """The path in "net.py:build"; the whole text in "net.onnx"."""
    path, colon, _ = architecture.rpartition(":")
    return path if colon and path.endswith(".py") else architecture


def is_path(weights: str) -> bool:
    """Whether a source of weights is a plain path: it has no "file:" or the like before it."""
    return weights not in WORDS and ":" not in weights and ("/" in weights or "." in weights)


def check_table(table: Mapping[str, Any]) -> None:
    """Checks names and types of the keys. Raises msgspec.ValidationError."""
    msgspec.convert(table, SCHEMA)


def all_keys() -> str:
    return ", ".join(keys())


def _joined(
    source: CardSource, find_base: Callable[[str, Path], CardSource], above: tuple[str, ...]
) -> tuple[dict[str, Any], list[bytes], list[str]]:
    """The card over its bases, the contents of all files, and notes."""
    table: dict[str, Any] = _stripped(msgspec.toml.decode(decode_text(source.content)))
    check_table(table)
    base = table.pop("base", "")
    if not base:
        return _resolved(table, source.folder), [source.content], []
    found = find_base(base, source.folder)
    identity = f"{found.folder}/{found.title}"
    if identity in above or len(above) >= MAX_BASES:
        raise ValueError(f"base {base!r} leads back to this card, or more than {MAX_BASES} deep")
    below, contents, notes = _joined(found, find_base, (*above, identity))
    below.pop("name", None)
    size = _fitting_resize(below.get("input", {}), table.get("input", {}))
    joined = _over(below, _resolved(table, source.folder))
    if size:
        joined["input"]["resize"], note = size
        notes.append(note)
    return joined, [source.content, *contents], notes


def _fitting_resize(below: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int, str] | None:
    """A resize for a new size of the input, and a note about it.

    The base's own would leave a black border around the crop. None if it fits.
    """
    if own.get("scale") is not None and not own.keys() >= {"mean", "std"}:
        raise ValueError("input.scale needs input.mean and input.std beside it, on that scale")
    resize = below.get("resize")
    if "resize" in own or not isinstance(resize, int) or not resize:
        return None
    sides = [own.get(side, below[side]) for side in ("height", "width")]
    if max(sides) <= resize:
        return None
    fitting = round(resize * max(sides) / max(below["height"], below["width"]))
    return fitting, (
        f"input.resize is {fitting}: the base's {resize} is smaller than the input "
        f"{sides[0]}x{sides[1]}, so it was enlarged by as much as the input"
    )


def _resolved(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The table with absolute paths."""
    changed = dict(table)
    if (weights := table.get("weights")) is not None:
        if is_path(weights):
            weights = f"file:{weights}"
        kind, _, rest = weights.partition(":")
        if kind == "file" and rest and not rest.startswith("//"):
            weights = f"file:{_absolute(rest, folder)}"
        changed["weights"] = weights
    labels = table.get("labels")
    if isinstance(labels, str) and labels and ("/" in labels or (folder / labels).exists()):
        changed["labels"] = _absolute(labels, folder)  # otherwise perhaps one of ours
    architecture = table.get("architecture", "")
    if is_network_file(architecture):
        path = network_path(architecture)
        changed["architecture"] = _absolute(path, folder) + architecture[len(path) :]
        if (
            path == architecture
        ):  # the file holds its weights; those of a base are of another network
            changed.setdefault("weights", f"file:{changed['architecture']}")
    return changed


def _absolute(path: str, folder: Path) -> str:
    return path if path.startswith("~") else str(folder / path)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the keys of `above` instead of its own, table by table."""
    joined = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(joined.get(key), dict):
            joined[key] = joined[key] | value
        else:
            joined[key] = value
    return joined


def _stripped(value: Any) -> Any:
    """The value with no blanks around its texts."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict):
        return {key: _stripped(each) for key, each in value.items()}
    return [_stripped(each) for each in value] if isinstance(value, list) else value
