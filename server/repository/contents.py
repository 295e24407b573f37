"""Lists what a model repository holds: versions, serving configurations and ignored entries."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from server.repository.manifest import MODEL_NAME, VERSION_NAME, InvalidVersion, Manifest
from server.repository.reader import read_manifest
from server.repository.serving_config import SERVING_CONFIG_FILE, ServingConfig, read_serving_config


class VersionEntry(NamedTuple):
    """A folder with the name of a version, and its manifest or the reason why it is invalid."""

    model: str
    version: int
    folder: Path
    manifest: Manifest | None
    reason: str  # why the version is invalid; empty if it has a manifest
    # Number of files, and time of the last change in nanoseconds. A new stamp means that a version
    # that failed may work now.
    stamp: tuple[int, int] = (0, 0)


class IgnoredEntry(NamedTuple):
    """An entry of the repository that is not used."""

    path: Path
    reason: str


class RepositoryContents(NamedTuple):
    """All entries of a repository."""

    versions: list[VersionEntry]  # see list_versions
    configs: dict[str, ServingConfig]  # by model; without those that can't be read
    ignored: list[IgnoredEntry]  # see list_ignored; and configurations that can't be read


def list_contents(root: Path) -> RepositoryContents:
    """Lists all entries of the repository. Raises OSError if `root` can't be read."""
    versions, ignored = list_versions(root), list_ignored(root)
    configs: dict[str, ServingConfig] = {}
    for model in dict.fromkeys(version.model for version in versions):
        try:
            configs[model] = read_serving_config(root / model)
        except InvalidVersion as error:
            ignored.append(IgnoredEntry(root / model / SERVING_CONFIG_FILE, str(error)))
    return RepositoryContents(versions, configs, ignored)


def list_versions(root: Path) -> list[VersionEntry]:
    """Lists valid and invalid versions: models by name, versions of a model from new to old.

    Checks manifests, file types and file sizes; `verify_files` checks the contents. Skips hidden
    entries, because a writer may still be at work there. Raises OSError if `root` can't be read.
    """
    found = []
    for home in _visible_entries(root):
        if _reason_to_ignore(home):
            continue
        with suppress(OSError):  # list_ignored reports it
            paths = [path for path in _visible_entries(home) if VERSION_NAME.fullmatch(path.name)]
            found += [_entry(path) for path in sorted(paths, key=lambda path: -int(path.name))]
    return found


def list_ignored(root: Path) -> list[IgnoredEntry]:
    """Lists folders and links that `list_versions` skips. Leaves out hidden entries and files.

    Raises OSError if `root` can't be read.
    """
    found = []
    for home in _visible_entries(root):
        if reason := _reason_to_ignore(home):
            if _is_folder(home) or home.is_symlink():
                found.append(IgnoredEntry(home, reason))
            continue
        try:
            paths = _visible_entries(home)
        except OSError as error:
            found.append(IgnoredEntry(home, f"it can't be read: {error.strerror}"))
            continue
        for path in paths:
            if not VERSION_NAME.fullmatch(path.name) and (_is_folder(path) or path.is_symlink()):
                reason = "a version must be named by a whole number from 1, of at most 18 digits"
                found.append(IgnoredEntry(path, reason))
    return found


def _entry(path: Path) -> VersionEntry:
    manifest, reason = None, ""
    try:
        if path.is_symlink():
            raise InvalidVersion("it is a symbolic link")
        if not _is_folder(path):
            raise InvalidVersion("it is not a folder")
        manifest = read_manifest(path)
    except InvalidVersion as error:
        reason = str(error)
    return VersionEntry(path.parent.name, int(path.name), path, manifest, reason, _stamp(path))


def _stamp(folder: Path) -> tuple[int, int]:
    try:
        changed = [entry.stat(follow_symlinks=False).st_mtime_ns for entry in os.scandir(folder)]
        return len(changed), max([folder.lstat().st_mtime_ns, *changed])
    except OSError:
        return 0, 0


def _reason_to_ignore(home: Path) -> str:
    """Why an entry of the root is not the folder of a model; empty if it is one."""
    if home.is_symlink():
        return "it is a symbolic link"
    if not _is_folder(home):
        return "it is not a folder"
    if not MODEL_NAME.fullmatch(home.name):
        return f"the name of a model must match {MODEL_NAME.pattern}"
    return ""


def _visible_entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
