"""Reads a model repository: which versions it holds, and the files of one version."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.images.decode import Pixels
from server.repository.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    MODEL_NAME,
    VERSION_NAME,
    EngineRecord,
    FileRecord,
    InvalidVersion,
    Manifest,
    decode_manifest,
)

LABELS_LIMIT_BYTES = 16 << 20
GOLDEN_LIMIT_BYTES = 256 << 20  # once unpacked


class Version(NamedTuple):
    """A folder that claims to be a version of a model, and whether it is one."""

    model: str
    version: int
    folder: Path
    manifest: Manifest | None
    reason: str  # why it can't be used, where there is no manifest; else empty
    stamp: tuple[int, int] = (0, 0)  # entries, and when one last changed: a failure is not for ever


class IgnoredEntry(NamedTuple):
    """Something in the repository that is no version of a model."""

    path: Path
    reason: str


class Golden(NamedTuple):
    """Inputs with the answers of eager float32 PyTorch."""

    pixels: Pixels  # [G, H, W, C]
    probabilities: NDArray[np.float32]  # [G, classes]


def scan(root: Path) -> list[Version]:
    """Every version under `root`, by model name, the newest first; the unsound with their reason.

    Looks at manifests, file kinds and sizes only; `verify` reads the contents. What is hidden is
    passed over: writers have not finished it. What has no version's place is left to `strays`.
    Raises OSError when `root` can't be read.
    """
    found = []
    for home in _entries(root):
        if _not_a_model(home):
            continue
        with suppress(OSError):  # told by `strays`
            paths = [path for path in _entries(home) if VERSION_NAME.fullmatch(path.name)]
            found += [_version(path) for path in sorted(paths, key=lambda path: -int(path.name))]
    return found


def strays(root: Path) -> list[IgnoredEntry]:
    """What `scan` passes over, and why; hidden entries and plain files beside folders are no news.

    Raises OSError when `root` can't be read.
    """
    found = []
    for home in _entries(root):
        if reason := _not_a_model(home):
            if _is_folder(home) or home.is_symlink():
                found.append(IgnoredEntry(home, reason))
            continue
        try:
            paths = _entries(home)
        except OSError as error:
            found.append(IgnoredEntry(home, f"it can't be read: {error.strerror}"))
            continue
        for path in paths:
            if not VERSION_NAME.fullmatch(path.name) and (_is_folder(path) or path.is_symlink()):
                reason = "a version is named by a whole number from 1, of 18 digits at most"
                found.append(IgnoredEntry(path, reason))
    return found


def read(folder: Path) -> Manifest:
    """The manifest of a version whose files are all there with their sizes. Raises Unsound."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InvalidVersion(f"{MANIFEST} is not a regular file")
        with path.open("rb") as file:
            text = file.read(MANIFEST_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise InvalidVersion(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise InvalidVersion(f"{MANIFEST} can't be read: {error.strerror}") from None
    if len(text) > MANIFEST_LIMIT_BYTES:
        raise InvalidVersion(f"{MANIFEST} is larger than {MANIFEST_LIMIT_BYTES} bytes")
    manifest = decode_manifest(text)
    if (manifest.model, str(manifest.version)) != (folder.parent.name, folder.name):
        raise InvalidVersion(
            f"{MANIFEST} is of {manifest.model} version {manifest.version}, "
            f"but lies in the folder {_printable(folder.parent.name)}/{_printable(folder.name)}"
        )
    for record in manifest.files():
        check_size(folder / record.name, record)
    return manifest


def verify(folder: Path, manifest: Manifest, engine: EngineRecord | None = None) -> None:
    """Compares the contents of a version's files with the manifest. Raises Unsound.

    With `engine`, of the engines' files only that one's.
    """
    unread = {
        file.name
        for other in manifest.engines
        if engine and other != engine
        for file in other.files
    }
    for record in manifest.files():
        if record.name not in unread:
            verify_file(folder, record)


def verify_file(folder: Path, record: FileRecord) -> None:
    """Compares the contents of one file with its record. Raises Unsound."""
    path = folder / record.name
    check_size(path, record)
    if sha256_of(path) != record.sha256:
        raise InvalidVersion(f"{record.name} is not what was published: its sha256 differs")


def read_labels(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """The class names by index. Raises Unsound."""
    name = manifest.labels.name
    if manifest.labels.bytes > LABELS_LIMIT_BYTES:
        raise InvalidVersion(f"{name} is larger than {LABELS_LIMIT_BYTES} bytes")
    try:
        text = (folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidVersion(f"{name} can't be read: {error}") from None
    labels = tuple(text.removesuffix("\n").split("\n"))  # splitlines would also split at U+2028
    if len(labels) != manifest.classes:
        raise InvalidVersion(f"{name} has {len(labels)} names for {manifest.classes} classes")
    return labels


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    """The golden inputs and answers. Raises Unsound."""
    name = manifest.golden.name
    row = (manifest.input.height, manifest.input.width, manifest.input.channels)
    try:
        with zipfile.ZipFile(folder / name) as archive:
            pixels = _read_array(archive, "pixels", np.dtype(np.uint8), row)
            answer = (manifest.classes,)
            probabilities = _read_array(archive, "probabilities", np.dtype(np.float32), answer)
    except InvalidVersion as error:
        raise InvalidVersion(f"{name}: {error}") from None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for a damaged file
        raise InvalidVersion(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if len(pixels) != len(probabilities):
        raise InvalidVersion(f"{name} has {len(pixels)} inputs and {len(probabilities)} answers")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if not (probabilities.min() >= 0 and np.abs(sums - 1).max() <= 1e-3):  # NaN is neither
        raise InvalidVersion(f"{name} has answers that are no probabilities")
    return Golden(pixels, probabilities)


def _read_array(
    archive: zipfile.ZipFile, name: str, kind: np.dtype[Any], row: tuple[int, ...]
) -> NDArray[Any]:
    """[G, *row] of a .npz, G at least 1; told by its header before anything large is unpacked."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            raise InvalidVersion(f"{name} are in .npy version {version}; 1.0 is needed")
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
        count = shape[0] if shape else 0
        if dtype != kind or by_column or count < 1 or shape[1:] != row:
            raise InvalidVersion(
                f"{name} are {dtype} {list(shape)}; {kind} {['G', *row]} is needed"
            )
        size = math.prod(shape) * kind.itemsize
        if size > GOLDEN_LIMIT_BYTES:
            raise InvalidVersion(f"{name} take {size} bytes; at most {GOLDEN_LIMIT_BYTES} are read")
        content = member.read(size)
        if len(content) != size:
            raise InvalidVersion(f"{name} end after {len(content)} of {size} bytes")
        if member.read(1):  # the end is also where the checksum is compared
            raise InvalidVersion(f"{name} go on after their {size} bytes")
    return np.frombuffer(content, kind).reshape(shape)


def _version(path: Path) -> Version:
    manifest, reason = None, ""
    try:
        if path.is_symlink() or not _is_folder(path):
            raise InvalidVersion(f"it is {'a symbolic link' if path.is_symlink() else 'no folder'}")
        manifest = read(path)
    except InvalidVersion as error:
        reason = str(error)
    return Version(path.parent.name, int(path.name), path, manifest, reason, _stamp(path))


def _stamp(folder: Path) -> tuple[int, int]:
    """How many entries a folder has, and when it or one of them last changed, in nanoseconds."""
    try:
        changed = [entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(folder)]
        return len(changed), max([folder.lstat().st_mtime_ns, *changed])
    except OSError:
        return 0, 0


def _not_a_model(home: Path) -> str:
    """Why an entry of the root is no model's folder; empty when it is one."""
    if home.is_symlink():
        return "it is a symbolic link"
    if not _is_folder(home):
        return "it is no folder"
    if not MODEL_NAME.fullmatch(home.name):
        return f"a model's name must match {MODEL_NAME.pattern}"
    return ""


def check_size(path: Path, record: FileRecord) -> None:
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


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _printable(name: str) -> str:
    """A file name as text that can be encoded, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidVersion(f"{path.name} can't be read: {error.strerror}") from None
