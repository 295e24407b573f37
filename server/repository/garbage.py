"""Finds and deletes what a repository no longer needs: old versions, and leftovers of writers."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from server.repository.contents import RepositoryContents, VersionEntry
from server.repository.serving_config import SERVE_LATEST, ServingConfig
from server.repository.writer import exclusive_lock, fsync

ABANDONED = re.compile(r"\.(staging|gone)-.*")  # folders of writers that stopped early


class Garbage(NamedTuple):
    """A folder that can be deleted."""

    path: Path
    reason: str


def find_garbage(contents: RepositoryContents, keep: int) -> list[Garbage]:
    """Lists what can be deleted if `keep` valid versions of each model stay.

    If serving.json of a model is invalid, all its versions stay: the file may name any of them.
    A model's folder that is a symbolic link is not cleaned: it belongs to somebody else.
    """
    garbage: list[Garbage] = []
    for home in dict.fromkeys(version.folder.parent for version in contents.versions):
        if home.is_symlink():
            continue
        garbage += _abandoned(home)
        if home.name in contents.configs:
            versions = [entry for entry in contents.versions if entry.folder.parent == home]
            garbage += _superseded(versions, contents.configs[home.name], keep)
    return garbage


def delete(path: Path) -> None:
    """Hides a version in one step, then deletes it, so that readers never see a part of it."""
    hidden = path
    if not path.name.startswith("."):
        hidden = Path(tempfile.mkdtemp(prefix=".gone-", dir=path.parent))
        path.rename(hidden / path.name)
        fsync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)  # another process may delete it too


def _abandoned(home: Path) -> list[Garbage]:
    """Folders of writers that stopped early. Folders of running writers are locked."""
    abandoned = []
    for path in sorted(home.iterdir()):
        if ABANDONED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError), exclusive_lock(path, wait=False):
                abandoned.append(Garbage(path, "left by a writer that stopped early"))
    return abandoned


def _superseded(
    versions: Sequence[VersionEntry], config: ServingConfig, keep: int
) -> list[Garbage]:
    """The versions of one model that are not used any more; `versions` run from new to old."""
    valid = [entry.version for entry in versions if entry.manifest is not None]
    kept = {*valid[:keep], *config.labels.values(), *config.policy(SERVE_LATEST).choose(valid)}
    newest = valid[0] if valid else 0
    garbage = []
    for entry in versions:
        if entry.version in kept:
            continue
        if entry.manifest is not None:
            garbage.append(Garbage(entry.folder, f"old; the newest {keep} valid versions are kept"))
        elif entry.version < newest:  # a newer invalid version may still be on its way here
            garbage.append(Garbage(entry.folder, f"invalid: {entry.reason}"))
    return garbage
