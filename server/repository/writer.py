"""Writes a model repository: publishes versions, adds engines to them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np

from server.repository.manifest import (
    FORMAT,
    MANIFEST,
    MODEL_NAME,
    VERSION_NAME,
    EngineRecord,
    FileRecord,
    InvalidVersion,
    Manifest,
    decode_manifest,
)
from server.repository.reader import Golden, check_size, read, sha256_of


@contextmanager
def staging(root: Path, model: str) -> Iterator[Path]:
    """An empty hidden folder beside the versions of `model`, for `publish`; gone at the end.

    Also clears away what writers that died have left there. Raises ValueError for a name no model
    may have.
    """
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name {model!r} must match {MODEL_NAME.pattern}")
    home = root / model
    for made in (root, home):
        if not made.is_dir():
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o755)  # whatever the writer's mask: the server may be another user
    with ExitStack() as held:
        with locked(home):
            for left in home.glob(".staging-*"):
                with suppress(OSError), locked(left, wait=False):
                    shutil.rmtree(left)
            folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=home))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(locked(folder))  # how the next writer knows that we live
        folder.chmod(0o755)  # mkdtemp's 0700 would keep a server of another user out
        yield folder


def publish(root: Path, staged: Path, manifest: Manifest) -> Manifest:
    """Makes the staged folder the next version of its model and returns its manifest.

    `manifest.version` is replaced by the number it gets. On return the version is on disk for good.
    Raises Unsound when the folder does not hold exactly the files of the manifest.
    """
    home = root / manifest.model
    with locked(home):
        taken = (int(path.name) for path in home.iterdir() if VERSION_NAME.fullmatch(path.name))
        version = max(taken, default=0) + 1
        manifest = msgspec.structs.replace(manifest, format=FORMAT, version=version)
        _write_manifest(staged, manifest)
        for file in manifest.files():
            check_size(staged / file.name, file)
        unnamed = {path.name for path in staged.iterdir()} - {MANIFEST}
        unnamed -= {file.name for file in manifest.files()}
        if unnamed:
            raise InvalidVersion(f"{sorted(unnamed)[0]} is not named in {MANIFEST}")
        for path in staged.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(staged)
        staged.rename(home / str(version))
        sync(home)
    sync(root)
    with suppress(OSError):  # where `root` is new too; not everybody may read the folder above
        sync(root.resolve().parent)
    return manifest


def add_engine(root: Path, staged: Path, manifest: Manifest, engine: EngineRecord) -> Manifest:
    """Adds an engine, whose files lie in the staged folder, to a published version.

    `manifest` says which version. The files come first and the new manifest takes the old one's
    place at once, so a reader sees the version with the engine or without. Returns the new
    manifest. Raises Unsound where the version is not what it was, or has such an engine.
    """
    home = root / manifest.model
    folder = home / str(manifest.version)
    with locked(home):
        manifest = read(folder)  # another writer may have added one meanwhile
        if engine.name in {other.name for other in manifest.engines}:
            raise InvalidVersion(
                f"{manifest.model} version {manifest.version} has {engine.name} already"
            )
        manifest = msgspec.structs.replace(manifest, engines=(*manifest.engines, engine))
        written = _write_manifest(staged, manifest)
        for file in engine.files:
            path = staged / file.name
            check_size(path, file)
            path.chmod(0o644)
            sync(path)
            path.rename(folder / file.name)  # over what a writer that died may have left
        sync(folder)
        written.chmod(0o644)
        sync(written)
        written.rename(folder / MANIFEST)
        sync(folder)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Writes the manifest there, unless it is one that can't be read back: then raises Unsound."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    decode_manifest(text)
    path = folder / MANIFEST
    path.write_bytes(text + b"\n")
    return path


def record(path: Path) -> FileRecord:
    """The record of a file as it is now."""
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def write_golden(path: Path, golden: Golden) -> None:
    """Writes what `read_golden` reads."""
    np.savez_compressed(path, pixels=golden.pixels, probabilities=golden.probabilities)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """No other writer is in the folder meanwhile. Raises OSError, also where one is and we do not
    wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Has the file, or the folder's names, on disk for good."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
