"""Reads a label file: the names of the classes by index. The ending of the file decides the form.

    .txt and others   one name per line, in the order of the classes
    .json             a list; index to name, as torchvision and Hugging Face's id2label write it;
                      or name to index, as Keras's class_indices
    .csv, .tsv        one column of names in order, or columns of indices and names

Names are cleaned: byte-order marks and blanks around a name are not part of it, and a line may end
in LF, CR LF or CR. Empty lines at the end are ignored. An empty line before the last name is an
error, because it would shift the names after it.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from server.repository.text import decode_text

# Invisible characters that editors and copied text leave: zero width space, word joiner, and the
# byte-order mark, which also remains between files that were joined.
INVISIBLE = "\u200b\u2060\ufeff"

# Keys of a JSON file below which the names are: configurations of models, results of training.
WRAPPERS = ("id2label", "label2id", "class_to_idx", "idx_to_class", "class_indices")
LISTS = ("labels", "classes", "class_names", "names", "vocab")
NAME_COLUMNS = ("label", "labels", "name", "names", "class", "classes", "class_name", "category")
INDEX_COLUMNS = ("index", "id", "idx", "class_id", "class_index", "label_id", "number")
DELIMITERS = ",;\t"


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a label file. Raises ValueError that names the file and the line."""
    reads = {".json": _json_names, ".csv": _csv_names, ".tsv": _csv_names}
    read = reads.get(path.suffix.lower(), _lines)
    try:
        return read(decode_text(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"labels in {path.name} can't be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"labels in {path.name}: {error}") from None


def check_names(names: Sequence[str], part: str = "name") -> tuple[str, ...]:
    """The names, cleaned. Raises ValueError that says which `part` is wrong: "name 2 is empty"."""
    cleaned = tuple(_clean(name) for name in names)
    if not cleaned:
        raise ValueError("it has no names; each line must be the name of one class")
    for number, name in enumerate(cleaned, start=1):
        _check(f"{part} {number}", name)
    return cleaned


def repeated_names(names: Sequence[str]) -> dict[str, list[int]]:
    """Names of more than one class, with the indices of these classes."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        indices.setdefault(name, []).append(index)
    return {name: found for name, found in indices.items() if len(found) > 1}


def _lines(text: str) -> tuple[str, ...]:
    lines = [_clean(line) for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return check_names(lines, "line")


def _json_names(text: str) -> tuple[str, ...]:
    try:
        content = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if isinstance(content, dict):
        for key in (*WRAPPERS, *LISTS):
            if isinstance(content.get(key), dict | list):
                content = content[key]
                break
    if isinstance(content, list):
        return check_names([_json_name(each) for each in content])
    if isinstance(content, dict) and content:
        return _by_index(_json_pairs(content))
    raise ValueError("it must be a list of names, index to name, or name to index")


def _json_pairs(content: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Index and name, from index to name or from name to index."""
    if all(isinstance(value, int) and not isinstance(value, bool) for value in content.values()):
        yield from ((index, name) for name, index in content.items())
        return
    for key, value in content.items():
        if not (key.strip().isascii() and key.strip().isdigit()):
            raise ValueError(
                f"{key!r} is neither an index nor a name with an index; it must be a list of "
                "names, index to name, or name to index"
            )
        yield int(key), _json_name(value)


def _json_name(value: object) -> str:
    """A name, or the last part of [WordNet id, name], as Keras writes."""
    if isinstance(value, list) and value:
        value = value[-1]
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a name; names must be texts")
    return value


def _csv_names(text: str) -> tuple[str, ...]:
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    rows = [
        [_clean(cell) for cell in row]
        for row in csv.reader(text.split("\n"), delimiter=delimiter, skipinitialspace=True)
        if any(_clean(cell) for cell in row)
    ]
    if not rows:
        raise ValueError("it has no names; each line must be the name of one class")
    if uneven := [number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])]:
        raise ValueError(
            f"row {uneven[0]} has {len(rows[uneven[0] - 1])} columns, the first row "
            f"{len(rows[0])}; put names with a {delimiter!r} between double quotes"
        )
    header = [cell.lower() for cell in rows[0]]
    has_header = any(cell in NAME_COLUMNS + INDEX_COLUMNS for cell in header)
    rows = rows[1:] if has_header else rows
    indices, names = _columns(header if has_header else [], rows)
    if names is None:
        raise ValueError(
            f"it has {len(header)} columns; which one is the name? Add a first row with "
            "'index' and 'name' above these columns"
        )
    if indices is None:
        return check_names([row[names] for row in rows], "row")
    return _by_index(_csv_pairs(rows, indices, names))


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[int | None, int | None]:
    """The columns of indices and of names. None: no such column."""
    columns = range(len(rows[0]) if rows else len(header))
    if len(columns) == 1:
        return None, 0
    by_header = {cell: number for number, cell in enumerate(header)}
    named = [by_header[cell] for cell in NAME_COLUMNS if cell in by_header]
    indexed = [by_header[cell] for cell in INDEX_COLUMNS if cell in by_header]
    whole = [column for column in columns if all(_is_index(row[column]) for row in rows)]
    index = next(iter([*indexed, *(column for column in whole if column not in named)]), None)
    others = [column for column in columns if column != index]
    guess = others[0] if len(others) == 1 else None
    return index, named[0] if named else guess


def _csv_pairs(
    rows: Sequence[Sequence[str]], indices: int, names: int
) -> Iterator[tuple[int, str]]:
    for row in rows:
        if not _is_index(row[indices]):
            raise ValueError(f"{row[indices]!r} is not an index; indices are 0, 1, 2, ...")
        yield int(row[indices]), row[names]


def _is_index(cell: str) -> bool:
    return cell.isascii() and cell.isdigit()


def _by_index(pairs: Iterator[tuple[int, str]]) -> tuple[str, ...]:
    """The names in the order of their indices, which must be 0, 1, 2, ..."""
    names: dict[int, str] = {}
    for index, name in pairs:
        if index in names:
            raise ValueError(f"index {index} has two names, {names[index]!r} and {name!r}")
        names[index] = name
    missing = [index for index in range(len(names)) if index not in names]
    if missing:
        raise ValueError(
            f"there are {len(names)} names, but index {missing[0]} has none; "
            "indices must be 0, 1, 2, ... without gaps"
        )
    return check_names([names[index] for index in range(len(names))])


def _clean(line: str) -> str:
    """Removes blanks and invisible characters from both ends, in any order."""
    cleaned = line.strip().strip(INVISIBLE)
    return cleaned if cleaned == line else _clean(cleaned)


def _check(part: str, name: str) -> None:
    if not name:
        raise ValueError(f"{part} is empty; each {part.split()[0]} must be the name of one class")
    for character in name:
        if unicodedata.category(character) == "Cc" and character != "\t":
            code = f"U+{ord(character):04X}"
            raise ValueError(f"{part} contains the control character {code}; remove it")
