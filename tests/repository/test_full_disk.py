"""Promise: a full disk is reported as such, and leaves nothing behind."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

import pytest

from server.repository.writer import publish, staging
from tests.repository.small_disk import small_disk
from tests.repository.versions import write_version


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def build_with_library(root: Path) -> None:
    with staging(root, "tiny") as staged:
        fill(staged / "model.bin")
        raise RuntimeError("basic_ios::clear: iostream error")


def build_and_publish(root: Path) -> None:
    with staging(root, "tiny") as staged:
        manifest = write_version(staged)
        fill(root / "other files")
        publish(root, staged, manifest)


def test_a_library_that_fails_on_a_full_disk_fails_with_no_space_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as root:
        with pytest.raises(OSError, match="No space left") as caught:
            build_with_library(root)
        assert caught.value.errno == errno.ENOSPC
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert list(root.iterdir()) == []


def test_publishing_on_a_full_disk_fails_with_no_space_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as root:
        with pytest.raises(OSError, match="No space left"):
            build_and_publish(root)
        assert [path.name for path in root.iterdir()] == ["other files"]


def test_another_failure_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="odd"), staging(tmp_path, "tiny"):
        raise RuntimeError("odd")
