"""Reads a label file: the names of the classes, one per line, by index.

Names are cleaned: byte-order marks and blanks around a name are not part of it, and a line may end
in LF, CR LF or CR. Empty lines at the end are ignored. An empty line before the last name is an
error, because it would shift the names after it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from server.repository.text import decode_text

# Invisible characters that editors and copied text leave: zero width space, word joiner, and the
# byte-order mark, which also remains between files that were joined.
INVISIBLE = "\u200b\u2060\ufeff"


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a label file. Raises ValueError that names the file and the line."""
    try:
        names = [_clean(line) for line in decode_text(path.read_bytes()).split("\n")]
        while names and not names[-1]:
            names.pop()
        if not names:
            raise ValueError("it has no names; each line must be the name of one class")
        for number, name in enumerate(names, start=1):
            _check(number, name)
    except ValueError as error:
        raise ValueError(f"labels in {path.name}: {error}") from None
    return tuple(names)


def repeated_names(names: Sequence[str]) -> dict[str, list[int]]:
    """Names of more than one class, with the indices of these classes."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        indices.setdefault(name, []).append(index)
    return {name: found for name, found in indices.items() if len(found) > 1}


def _clean(line: str) -> str:
    """Removes blanks and invisible characters from both ends, in any order."""
    cleaned = line.strip().strip(INVISIBLE)
    return cleaned if cleaned == line else _clean(cleaned)


def _check(number: int, name: str) -> None:
    if not name:
        raise ValueError(f"line {number} is empty; each line must be the name of one class")
    for character in name:
        if unicodedata.category(character) == "Cc" and character != "\t":
            code = f"U+{ord(character):04X}"
            raise ValueError(f"line {number} contains the control character {code}; remove it")
