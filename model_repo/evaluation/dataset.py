"""Labelled images: a folder with one subfolder per class, or a CSV file of files and classes.

Classes are given by their label or by their index, in one data set all in the same way.
"""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from server.errors import InvalidInput
from server.images.decode import decode
from server.images.input_spec import InputSpec, Pixels
from server.repository.text import decode_text

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif")
FILE_COLUMNS = ("file", "filename", "file_name", "filepath", "path", "image", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "class_id")
DELIMITERS = ",;\t"
MAX_SHOWN = 3  # names of classes or files in one message


class DataError(Exception):
    """The data set can't be used. The message says why and what to do."""


class Sample(NamedTuple):
    """One labelled image."""

    path: Path
    label: int  # index of the class


class DataSet(NamedTuple):
    """Labelled images in a fixed order, and the files that were left out."""

    root: Path
    samples: tuple[Sample, ...]
    ignored: tuple[Path, ...] = ()  # files that are not images by their ending, or have no class


def read_data(path: Path, labels: Sequence[str]) -> DataSet:
    """Lists the labelled images of a folder or a CSV file. Raises DataError.

    Reads no image: a file that is not an image is found when it is decoded.
    """
    if path.is_dir():
        data = _read_folder(path, labels)
    elif path.is_file():
        data = _read_csv(path, labels)
    else:
        raise DataError(
            f"--data {path} does not exist; give a folder with one subfolder per class, or a CSV "
            "file with the columns file and label"
        )
    if not data.samples:
        raise DataError(
            f"--data {path} has no images; {', '.join(IMAGE_ENDINGS)} files in one subfolder per "
            "class are needed"
        )
    return data


def _read_folder(root: Path, labels: Sequence[str]) -> DataSet:
    try:
        entries = sorted(each for each in root.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise DataError(f"--data {root} can't be read: {error.strerror}") from None
    folders = [entry for entry in entries if entry.is_dir()]
    ignored = [entry for entry in entries if not entry.is_dir()]
    if not folders:
        raise DataError(
            f"--data {root} has no subfolders; one subfolder per class is needed, named by the "
            f"label or the index of the class ({_examples(labels)})"
        )
    classes = _classes_of([folder.name for folder in folders], labels, f"--data {root}: folder")
    samples = []
    for folder in folders:
        for file in files_below(folder):
            if file.suffix.lower() in IMAGE_ENDINGS:
                samples.append(Sample(file, classes[folder.name]))
            else:
                ignored.append(file)
    return DataSet(root, tuple(samples), tuple(ignored))


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth, in order. Follows symbolic links, each folder once."""
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def decoded_file(path: Path, spec: InputSpec) -> Pixels | str:
    """The pixels as the server decodes them, or why there are none."""
    try:
        return decode(path.read_bytes(), spec, field=path.name)
    except OSError as error:
        return f"{path.name} can't be read: {error.strerror}"
    except InvalidInput as error:
        return str(error)


def _read_csv(path: Path, labels: Sequence[str]) -> DataSet:
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise DataError(f"--data {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"--data {path}: {error}") from None
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"--data {path}: line {reader.line_num} is not CSV: {error}") from None
    if not rows:
        raise DataError(f"--data {path} is empty; lines of file and label are needed")
    file_column, label_column, has_header = _columns(rows[0][1])
    files, names = [], []
    for number, row in rows[has_header:]:
        if len(row) <= max(file_column, label_column):
            raise DataError(
                f"--data {path}: line {number} has {len(row)} columns; a file and a label, "
                f"separated by {delimiter!r}, are needed"
            )
        file = path.parent / row[file_column].strip()
        if not file.is_file():
            raise DataError(
                f"--data {path}: line {number}: there is no file {row[file_column].strip()}; paths "
                "start in the folder of the CSV file"
            )
        files.append(file)
        names.append(row[label_column].strip())
    classes = _classes_of(names, labels, f"--data {path}: label")
    samples = (Sample(file, classes[name]) for file, name in zip(files, names, strict=True))
    return DataSet(path, tuple(samples))


def _columns(row: Sequence[str]) -> tuple[int, int, bool]:
    """The columns of files and labels, and whether the row is a header."""
    names = [cell.strip().lower() for cell in row]
    file = next((names.index(name) for name in FILE_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    if file is not None and label is not None:
        return file, label, True
    return 0, 1, False


def _classes_of(names: Sequence[str], labels: Sequence[str], what: str) -> Mapping[str, int]:
    """The index of the class that each name means. Raises DataError.

    If every name is a label, they are labels, even where they look like numbers. If every name is
    a number, they are indices.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_label[_simplified(label)].append(index)
    distinct = list(dict.fromkeys(names))
    unknown = [name for name in distinct if _simplified(name) not in by_label]
    if not unknown:
        found = {name: by_label[_simplified(name)] for name in distinct}
        if several := [name for name, indices in found.items() if len(indices) > 1]:
            raise DataError(
                f"{what} {several[0]!r} is the label of several classes "
                f"({', '.join(map(str, found[several[0]]))}); name them all by index"
            )
        return {name: indices[0] for name, indices in found.items()}
    indices = {name: int(name) for name in distinct if name.isascii() and name.isdecimal()}
    if len(indices) == len(distinct):
        if high := [name for name, index in indices.items() if index >= len(labels)]:
            raise DataError(
                f"{what} {high[0]} is not a class: the model has {len(labels)} classes, "
                f"0 to {len(labels) - 1}"
            )
        return indices
    raise DataError(_unknown(unknown, labels, what))


def _unknown(unknown: Sequence[str], labels: Sequence[str], what: str) -> str:
    simple = {_simplified(label): label for label in labels}
    close = get_close_matches(_simplified(unknown[0]), simple, n=MAX_SHOWN, cutoff=0.6)
    likely = f"; similar: {', '.join(simple[name] for name in close)}" if close else ""
    others = f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else ""
    return (
        f"{what} {unknown[0]!r} is neither a label of the model nor an index{others}{likely}. "
        f"The model has {len(labels)} classes: {_examples(labels)}"
    )


def _examples(labels: Iterable[str]) -> str:
    names = list(labels)
    more = ", ..." if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _simplified(name: str) -> str:
    """A label as it may appear in the name of a folder, which can hold no slash."""
    for character in "_-/\\":
        name = name.replace(character, " ")
    return " ".join(name.casefold().split())
