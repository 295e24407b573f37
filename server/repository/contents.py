"""Lists what a model repository holds: versions, serving configurations and ignored entries."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from server.repository.evaluation import EvaluationRecord, read_evaluation
from server.repository.links import Links
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
    # Number of files, and sum of their times of change in nanoseconds. A new stamp means that a
    # version that failed may work now.
    stamp: tuple[int, int] = (0, 0)
    evaluation: EvaluationRecord | None = None


class IgnoredEntry(NamedTuple):
    """An entry of the repository that is not used."""

    path: Path
    reason: str


class RepositoryContents(NamedTuple):
    """All entries of a repository."""

    versions: list[VersionEntry]  # see list_versions
    configs: dict[str, ServingConfig]  # by model; without those that can't be read
    ignored: list[IgnoredEntry]  # folders, links and configurations


def list_contents(root: Path, allowed_roots: Sequence[Path] = ()) -> RepositoryContents:
    """Lists all entries of the repository.

    Symbolic links may lead into the repository and into `allowed_roots`. Raises OSError if `root`
    can't be read.
    """
    links = Links.within(root, allowed_roots)
    versions = list_versions(root, allowed_roots)
    ignored = list_ignored(root, allowed_roots)
    configs: dict[str, ServingConfig] = {}
    for model in dict.fromkeys(version.model for version in versions):
        try:
            configs[model] = read_serving_config(root / model, links)
        except InvalidVersion as error:
            ignored.append(IgnoredEntry(root / model / SERVING_CONFIG_FILE, str(error)))
    return RepositoryContents(versions, configs, ignored)


def list_versions(root: Path, allowed_roots: Sequence[Path] = ()) -> list[VersionEntry]:
    """Lists valid and invalid versions: models by name, versions of a model from new to old.

    Checks manifests, file types and file sizes; `verify_files` checks the contents. Skips hidden
    entries, because a writer may still be at work there. For links and errors see list_contents.
    """
    links = Links.within(root, allowed_roots)
    found = []
    for home in _visible_entries(root):
        if _reason_to_ignore(home, links):
            continue
        with suppress(OSError):  # list_ignored reports it
            paths = [path for path in _visible_entries(home) if VERSION_NAME.fullmatch(path.name)]
            paths.sort(key=lambda path: -int(path.name))
            found += [_entry(path, links) for path in paths]
    return found


def list_ignored(root: Path, allowed_roots: Sequence[Path] = ()) -> list[IgnoredEntry]:
    """Lists folders and links that `list_versions` skips. Leaves out hidden entries and files.

    For links and errors see list_contents.
    """
    links = Links.within(root, allowed_roots)
    found = []
    for home in _visible_entries(root):
        if reason := _reason_to_ignore(home, links):
            if _is_folder_or_link(home):
                found.append(IgnoredEntry(home, reason))
            continue
        try:
            paths = _visible_entries(home)
        except OSError as error:
            found.append(IgnoredEntry(home, f"it can't be read: {error.strerror}"))
            continue
        for path in paths:
            if not VERSION_NAME.fullmatch(path.name) and _is_folder_or_link(path):
                reason = "a version must be named by a whole number from 1, of at most 18 digits"
                found.append(IgnoredEntry(path, reason))
    return found


def _entry(path: Path, links: Links) -> VersionEntry:
    manifest, evaluation, reason = None, None, ""
    try:
        if not stat.S_ISDIR(links.real_path(path).stat().st_mode):
            raise InvalidVersion("it is not a folder")
        manifest = read_manifest(path, links)
        evaluation = read_evaluation(path, links)
    except InvalidVersion as error:
        reason = str(error)
    except OSError as error:  # it was removed, or its model's folder can't be searched
        reason = f"it can't be read: {error.strerror}"
    model, number = path.parent.name, int(path.name)
    return VersionEntry(model, number, path, manifest, reason, _stamp(path), evaluation)


def _stamp(folder: Path) -> tuple[int, int]:
    """Counts links twice: they may be replaced, and the files that they lead to may change."""
    try:
        entries = list(os.scandir(folder))
        times = [folder.lstat().st_mtime_ns, folder.stat().st_mtime_ns]
        for entry in entries:
            times.append(entry.stat(follow_symlinks=False).st_mtime_ns)
            if entry.is_symlink():
                with suppress(OSError):  # the target does not exist
                    times.append(entry.stat().st_mtime_ns)
    except OSError:
        return 0, 0
    return len(entries), sum(times)


def _reason_to_ignore(home: Path, links: Links) -> str:
    """Why an entry of the root is not the folder of a model; empty if it is one."""
    try:
        is_folder = stat.S_ISDIR(links.real_path(home).stat().st_mode)
    except InvalidVersion as error:
        return str(error)
    except OSError as error:  # it was removed
        return f"it can't be read: {error.strerror}"
    if not is_folder:
        return "it is not a folder"
    if not MODEL_NAME.fullmatch(home.name):
        return f"the name of a model must match {MODEL_NAME.pattern}"
    return ""


def _visible_entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_folder_or_link(path: Path) -> bool:
    """Whether it may be meant as a model or a version. Links to files are not."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and not path.is_file())
