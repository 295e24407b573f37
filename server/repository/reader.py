"""Reads and verifies the files of one version.

The reader trusts nothing in a version: it checks sizes before it reads a file or allocates memory.
"""

from __future__ import annotations

import hashlib
import math
import stat
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.images.input_spec import Pixels
from server.repository.links import ANYWHERE, Links, printable
from server.repository.manifest import (
    MANIFEST_FILE,
    Activation,
    EngineRecord,
    FileRecord,
    InvalidVersion,
    Manifest,
    decode_manifest,
)

# Usual sizes: a few kilobytes, a few kilobytes, and a few megabytes.
MAX_MANIFEST_BYTES = 1 << 20
MAX_LABELS_BYTES = 16 << 20
MAX_GOLDEN_BYTES = 256 << 20  # of one array, uncompressed


class Golden(NamedTuple):
    """Golden inputs, and the answers of eager float32 PyTorch to them."""

    pixels: Pixels  # [G, H, W, C]
    probabilities: NDArray[np.float32]  # [G, classes]
    activation: Activation = "softmax"


class OpenVersion(NamedTuple):
    """The content of a version, without its engines."""

    manifest: Manifest
    labels: tuple[str, ...]  # class names by index
    golden: Golden


def open_version(folder: Path, manifest: Manifest | None = None) -> OpenVersion:
    """Reads the labels and golden inputs of a version, and its manifest if none is given.

    Does not compare checksums; `verify_files` does. Raises InvalidVersion.
    """
    if manifest is None:
        manifest = read_manifest(folder)
    return OpenVersion(manifest, _read_labels(folder, manifest), read_golden(folder, manifest))


def read_manifest(folder: Path, links: Links = ANYWHERE) -> Manifest:
    """Reads the manifest, and checks that every file exists and has the right size.

    `links` says where symbolic links may lead. Later reads follow all links, because the checksums
    in the manifest hold for any file. Raises InvalidVersion.
    """
    try:
        text = read_limited(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES, links)
    except FileNotFoundError:
        raise InvalidVersion(f"{MANIFEST_FILE} is missing") from None
    manifest = decode_manifest(text)
    if (manifest.model, str(manifest.version)) != (folder.parent.name, folder.name):
        raise InvalidVersion(
            f"{MANIFEST_FILE} is of {manifest.model} version {manifest.version}, "
            f"but the folder is {printable(folder.parent.name)}/{printable(folder.name)}"
        )
    for record in manifest.files():
        check_size(_real_path(folder, record, links), record)
    return manifest


def _real_path(folder: Path, record: FileRecord, links: Links) -> Path:
    try:
        return links.real_path(folder / record.name, record.name)
    except FileNotFoundError:
        raise InvalidVersion(f"{record.name} is missing") from None


def verify_files(folder: Path, manifest: Manifest, engine: EngineRecord | None = None) -> None:
    """Compares the contents of a version's files with the manifest. Raises InvalidVersion.

    If `engine` is given, skips the files of the other engines.
    """
    skipped = {
        file.name
        for other in manifest.engines
        if engine and other != engine
        for file in other.files
    }
    for record in manifest.files():
        if record.name not in skipped:
            verify_file(folder, record)


def verify_file(folder: Path, record: FileRecord) -> None:
    """Compares the contents of one file with its record. Raises InvalidVersion."""
    check_size(_real_path(folder, record, ANYWHERE), record)
    if sha256_of(folder / record.name) != record.sha256:
        raise InvalidVersion(f"{record.name} is not what was published: its sha256 differs")


def check_size(path: Path, record: FileRecord) -> None:
    """Checks that a regular file of the right size exists, not a link. Raises InvalidVersion."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise InvalidVersion(f"{record.name} is missing") from None
    except OSError as error:
        raise InvalidVersion(f"{record.name} can't be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidVersion(f"{record.name} is not a regular file")
    if status.st_size != record.bytes:
        raise InvalidVersion(
            f"{record.name} has {status.st_size} bytes; {record.bytes} were published"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises InvalidVersion."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidVersion(f"{path.name} can't be read: {error.strerror}") from None


def read_limited(path: Path, limit_bytes: int, links: Links = ANYWHERE) -> bytes:
    """Reads a regular file of at most `limit_bytes`. Raises FileNotFoundError, InvalidVersion."""
    real = links.real_path(path, path.name)
    try:
        if not stat.S_ISREG(real.lstat().st_mode):
            raise InvalidVersion(f"{path.name} is not a regular file")
        with real.open("rb") as file:
            text = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidVersion(f"{path.name} can't be read: {error.strerror}") from None
    if len(text) > limit_bytes:
        raise InvalidVersion(f"{path.name} is larger than {limit_bytes} bytes")
    return text


def _read_labels(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    name = manifest.labels.name
    if manifest.labels.bytes > MAX_LABELS_BYTES:
        raise InvalidVersion(f"{name} is larger than {MAX_LABELS_BYTES} bytes")
    try:
        text = (folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidVersion(f"{name} can't be read: {error}") from None
    labels = tuple(text.removesuffix("\n").split("\n"))  # splitlines() would also split at U+2028
    if len(labels) != manifest.classes:
        raise InvalidVersion(f"{name} has {len(labels)} names for {manifest.classes} classes")
    return labels


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """Reads the golden inputs and their answers. Raises InvalidVersion."""
    name = manifest.golden.name
    row = (manifest.input.height, manifest.input.width, manifest.input.channels)
    try:
        with zipfile.ZipFile(folder / name) as archive:
            pixels = _read_array(archive, "pixels", np.dtype(np.uint8), row)
            answer = (manifest.classes,)
            probabilities = _read_array(archive, "probabilities", np.dtype(np.float32), answer)
    except InvalidVersion as error:
        raise InvalidVersion(f"{name}: {error}") from None
    except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged file
        raise InvalidVersion(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if len(pixels) != len(probabilities):
        raise InvalidVersion(f"{name} has {len(pixels)} inputs and {len(probabilities)} answers")
    if not _are_probabilities(probabilities, manifest.activation):
        raise InvalidVersion(f"{name} has answers that are not probabilities")
    return Golden(pixels, probabilities, manifest.activation)


def _are_probabilities(answers: NDArray[np.float32], activation: Activation) -> bool:
    """Written so that NaN is refused too."""
    if activation == "sigmoid":
        return bool(answers.min() >= 0 and answers.max() <= 1)
    sums = answers.sum(axis=1, dtype=np.float64)
    return bool(answers.min() >= 0 and np.abs(sums - 1).max() <= 1e-3)


def _read_array(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], row: tuple[int, ...]
) -> NDArray[Any]:
    """Reads an array [G, *row] with G >= 1; checks its header before it reads the contents."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise InvalidVersion(f"{name} has .npy version {version}; 1.0 is needed")
        shape, by_column, given = np.lib.format.read_array_header_1_0(member)
        count = shape[0] if shape else 0
        if given != dtype or by_column or count < 1 or shape[1:] != row:
            raise InvalidVersion(
                f"{name} is {given} {list(shape)}; {dtype} {['G', *row]} is needed"
            )
        size = math.prod(shape) * dtype.itemsize
        if size > MAX_GOLDEN_BYTES:
            raise InvalidVersion(f"{name} has {size} bytes; at most {MAX_GOLDEN_BYTES} are allowed")
        content = member.read(size)
        if len(content) != size:
            raise InvalidVersion(f"{name} has {len(content)} of {size} bytes")
        if member.read(1):  # zipfile compares the checksum at the end of the member
            raise InvalidVersion(f"{name} has more than {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape)
