"""Writes a model repository: publishes versions and adds engines to them.

A writer prepares files in a hidden folder beside the versions, syncs them to disk and renames them.
So readers see all of a version or nothing of it, even if the writer stops at any point.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOTDIR
from pathlib import Path

import msgspec
import numpy as np

from server.repository.manifest import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    MODEL_NAME,
    VERSION_NAME,
    EngineRecord,
    FileRecord,
    InvalidVersion,
    Manifest,
    decode_manifest,
)
from server.repository.reader import Golden, check_size, read_manifest, sha256_of

STAGING = ".staging-"  # start of the names of hidden folders
# What this process has created and not finished yet, in this order: see discard_unfinished.
_unfinished: list[Path] = []

PROBE_BYTES = 64 << 10  # does not fit on a disk that a larger file has filled


@contextmanager
def staging(root: Path, model: str) -> Iterator[Path]:
    """Creates an empty hidden folder for the files of a new version, and removes it at the end.

    Also removes the folders of writers that stopped early. If nothing was published, removes the
    folders of the model and the repository that it created. Raises ValueError if `model` is not a
    valid name. If the body fails on a full disk, raises OSError whatever the body raised.
    """
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name {model!r} must match {MODEL_NAME.pattern}")
    home = root / model
    staged = home / f"{STAGING}{secrets.token_hex(8)}"
    # Noted before anything is created, because a signal may end the process at any time.
    folders = (*reversed(home.parents), home)
    created = [*(folder for folder in folders if not folder.is_dir()), staged]
    _unfinished.extend(created)
    try:
        with _staged_folder(home, staged):
            try:
                yield staged
            except OSError:
                raise
            except Exception as error:
                for folder in (staged, Path(tempfile.gettempdir())):
                    check_disk(folder, PROBE_BYTES, error)
                raise
    finally:
        try:
            for path in reversed(created):
                _discard(path)
        finally:
            for path in created:
                _unfinished.remove(path)


@contextmanager
def _staged_folder(home: Path, staged: Path) -> Iterator[None]:
    """Creates the folder and locks it, which shows other writers that this one is at work."""
    while True:
        for folder in (home.parent, home):
            _create_folder(folder)
        with ExitStack() as locked:
            try:
                with exclusive_lock(home):
                    _remove_abandoned(home)
                    staged.mkdir()
                    locked.enter_context(exclusive_lock(staged))
            except FileNotFoundError:
                if home.is_dir():
                    raise
                continue  # a writer that failed has just removed the empty folder
            staged.chmod(0o755)
            yield
            return


def _create_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), str(folder)) from None
    folder.chmod(0o755)  # ignores the umask: the server may run as another user


def _remove_abandoned(home: Path) -> None:
    for abandoned in home.glob(f"{STAGING}*"):
        with suppress(OSError), exclusive_lock(abandoned, wait=False):
            shutil.rmtree(abandoned)


def discard_unfinished() -> None:
    """Removes the files of this process that are not published yet.

    For a process that ends at once: another thread may still be writing, and must not go on.
    """
    for path in reversed(_unfinished):
        _discard(path)


def _discard(path: Path) -> None:
    """Removes a staged folder, a folder if it is empty, or a file, if it exists."""
    with suppress(OSError):
        if path.name.startswith(STAGING):
            # Renamed first: a writer that is still at work must not publish a part of it.
            discarded = path.with_name(f"{path.name}.discarded")
            with suppress(FileNotFoundError):
                path.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)
        elif path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def check_disk(folder: Path, bytes: int, cause: Exception) -> None:
    """Raises OSError if the folder has no room for a file of this size.

    Libraries report a full disk in words of their own: "basic_ios::clear: iostream error".
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror) from cause


def publish(root: Path, staged: Path, manifest: Manifest) -> Manifest:
    """Publishes the staged folder as the next version of its model; returns the final manifest.

    Sets `manifest.version`. When it returns, the version is safely on disk. Raises InvalidVersion
    if the folder does not hold exactly the files of the manifest.
    """
    home = root / manifest.model
    with exclusive_lock(home):
        taken = (int(path.name) for path in home.iterdir() if VERSION_NAME.fullmatch(path.name))
        version = max(taken, default=0) + 1
        manifest = msgspec.structs.replace(manifest, format=MANIFEST_FORMAT, version=version)
        _write_manifest(staged, manifest)
        for file in manifest.files():
            check_size(staged / file.name, file)
        unlisted = {path.name for path in staged.iterdir()} - {MANIFEST_FILE}
        unlisted -= {file.name for file in manifest.files()}
        if unlisted:
            raise InvalidVersion(f"{sorted(unlisted)[0]} is not listed in {MANIFEST_FILE}")
        for path in staged.iterdir():
            path.chmod(0o644)
            fsync(path)
        fsync(staged)
        staged.rename(home / str(version))
        fsync(home)
    fsync(root)
    with suppress(OSError):  # `root` may be new; but not every user may read its parent
        fsync(root.resolve().parent)
    return manifest


def add_engine(root: Path, staged: Path, manifest: Manifest, engine: EngineRecord) -> Manifest:
    """Adds an engine from the staged folder to a published version; returns the new manifest.

    `manifest` names the version. The engine's files are moved first. Then the new manifest replaces
    the old one in one step, so readers see the version with or without the engine. Raises
    InvalidVersion if the version is invalid now or already has an engine of this name.
    """
    home = root / manifest.model
    folder = home / str(manifest.version)
    with exclusive_lock(home):
        manifest = read_manifest(folder)  # another writer may have added an engine
        if engine.name in {other.name for other in manifest.engines}:
            raise InvalidVersion(
                f"{manifest.model} version {manifest.version} already has engine {engine.name}"
            )
        manifest = msgspec.structs.replace(manifest, engines=(*manifest.engines, engine))
        written = _write_manifest(staged, manifest)
        moved = [folder / file.name for file in engine.files]
        _unfinished.extend(moved)
        try:
            for file in engine.files:
                path = staged / file.name
                check_size(path, file)
                path.chmod(0o644)
                fsync(path)
                path.rename(folder / file.name)  # replaces a file of a writer that stopped early
            fsync(folder)
            written.chmod(0o644)
            fsync(written)
        except BaseException:
            for path in moved:
                _discard(path)
            raise
        finally:  # from here on the files are published
            for path in moved:
                _unfinished.remove(path)
        written.rename(folder / MANIFEST_FILE)
        fsync(folder)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes the manifest. Raises InvalidVersion if a reader would reject it."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    decode_manifest(text)
    path = folder / MANIFEST_FILE
    path.write_bytes(text + b"\n")
    return path


def file_record(path: Path) -> FileRecord:
    """The record of a file in its present state."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def write_golden(path: Path, golden: Golden) -> None:
    """Writes golden inputs and answers for `read_golden`."""
    np.savez_compressed(path, pixels=golden.pixels, probabilities=golden.probabilities)


@contextmanager
def exclusive_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps other writers out of a folder.

    Raises OSError, also if the folder is locked and `wait` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
