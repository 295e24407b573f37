"""Publishing adds a complete, readable version with the next number, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from server.repository.contents import list_versions
from server.repository.manifest import InvalidVersion
from server.repository.reader import open_version, verify_files
from server.repository.writer import (
    add_engine,
    discard_unfinished,
    file_record,
    publish,
    staging,
)
from tests.repository.versions import ENGINE, publish_version, write_version


class Crash(BaseException):
    """The machine stops at this point."""


def test_a_published_version_is_read_back_unchanged(tmp_path: Path) -> None:
    published = publish_version(tmp_path)
    assert published.version == 1
    (found,) = list_versions(tmp_path)
    assert (found.model, found.version, found.reason) == ("tiny", 1, "")
    assert found.folder == tmp_path / "tiny" / "1"
    assert found.manifest == published
    verify_files(found.folder, published)
    manifest, labels, golden = open_version(found.folder)
    assert manifest == published
    assert labels == ("cat", "dog", "sea cow")
    rng = np.random.default_rng(0)
    assert np.array_equal(golden.pixels, rng.integers(0, 256, (2, 4, 5, 3), np.uint8))
    assert np.array_equal(golden.probabilities, rng.dirichlet(np.ones(3), 2).astype(np.float32))


def test_version_numbers_increase_and_the_newest_is_listed_first(tmp_path: Path) -> None:
    for number in range(1, 12):
        assert publish_version(tmp_path).version == number
    assert [entry.version for entry in list_versions(tmp_path)] == list(range(11, 0, -1))


def test_the_number_of_an_invalid_version_is_not_used_again(tmp_path: Path) -> None:
    publish_version(tmp_path)
    (tmp_path / "tiny" / "7").mkdir()
    (tmp_path / "tiny" / "9").write_text("no folder")
    assert publish_version(tmp_path).version == 10


def test_every_user_can_read_a_published_version_and_it_holds_nothing_else(
    tmp_path: Path,
) -> None:
    before = os.umask(0o077)
    try:
        publish_version(tmp_path)
    finally:
        os.umask(before)
    folder = tmp_path / "tiny" / "1"
    for each in (folder, folder.parent):
        assert each.stat().st_mode & 0o777 == 0o755
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ["manifest.json", "model.onnx", "golden.npz", "labels.txt", "engine.bin"], 0o644
    )
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_a_folder_that_differs_from_its_manifest_is_not_published(tmp_path: Path) -> None:
    def extra(staged: Path) -> None:
        (staged / "cache").mkdir()

    def missing(staged: Path) -> None:
        (staged / "engine.bin").unlink()

    def shorter(staged: Path) -> None:
        (staged / "engine.bin").write_bytes(b"")

    def linked(staged: Path) -> None:
        (staged / "engine.bin").rename(tmp_path / "elsewhere")
        (staged / "engine.bin").symlink_to(tmp_path / "elsewhere")

    for damage, words in (
        (extra, "cache is not listed in manifest.json"),
        (missing, "engine.bin is missing"),
        (shorter, "engine.bin has 0 bytes; 6000 were published"),
        (linked, "engine.bin is not a regular file"),
    ):
        with staging(tmp_path, "tiny") as staged:
            manifest = write_version(staged)
            damage(staged)
            with pytest.raises(InvalidVersion, match=words):
                publish(tmp_path, staged, manifest)
    assert list_versions(tmp_path) == []


def test_a_manifest_that_a_reader_would_reject_is_not_published(tmp_path: Path) -> None:
    with staging(tmp_path, "tiny") as staged:
        manifest = msgspec.structs.replace(write_version(staged), objective_ms=float("nan"))
        with pytest.raises(InvalidVersion, match="objective_ms"):
            publish(tmp_path, staged, manifest)
    assert list_versions(tmp_path) == []


def test_an_invalid_model_name_is_rejected(tmp_path: Path) -> None:
    for name in ("", "../tiny", "a/b", "Tiny", ".hidden", "a" * 65, "tiny\n"):
        with pytest.raises(ValueError, match="model name"), staging(tmp_path, name):
            pass
    assert list(tmp_path.iterdir()) == []


def test_publishing_fails_when_version_numbers_are_used_up(tmp_path: Path) -> None:
    (tmp_path / "tiny" / ("9" * 18)).mkdir(parents=True)
    with staging(tmp_path, "tiny") as staged, pytest.raises(InvalidVersion, match="version"):
        publish(tmp_path, staged, write_version(staged))


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def build() -> None:
        with staging(tmp_path, "tiny") as staged:
            write_version(staged)
            raise Crash

    with pytest.raises(Crash):
        build()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tiny").mkdir()
    with pytest.raises(Crash):
        build()
    assert list(tmp_path.rglob("*")) == [tmp_path / "tiny"], "it was there before"


def test_a_discarded_version_cannot_be_published(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with staging(root, "tiny") as staged:
        manifest = write_version(staged)
        discard_unfinished()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(FileNotFoundError):
            publish(root, staged, manifest)
    discard_unfinished()
    assert list(tmp_path.iterdir()) == []


def test_a_published_version_is_not_discarded(tmp_path: Path) -> None:
    with staging(tmp_path, "tiny") as staged:
        publish(tmp_path, staged, write_version(staged))
        discard_unfinished()
    assert [version.reason for version in list_versions(tmp_path)] == [""]


@pytest.mark.parametrize("discarded", [True, False])
def test_an_engine_whose_addition_is_interrupted_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, discarded: bool
) -> None:
    published = publish_version(tmp_path)
    folder = tmp_path / "tiny" / "1"
    before = sorted(folder.iterdir())

    def stop(path: int) -> None:
        if (folder / "second.bin").exists():
            if discarded:  # a signal ends the process
                discard_unfinished()
                assert sorted(folder.iterdir()) == before
            raise Crash

    def add() -> None:
        with staging(tmp_path, "tiny") as staged:
            (staged / "second.bin").write_bytes(ENGINE)
            second = msgspec.structs.replace(
                published.engines[0], name="second", files=(file_record(staged / "second.bin"),)
            )
            monkeypatch.setattr(os, "fsync", stop)
            add_engine(tmp_path, staged, published, second)

    with pytest.raises(Crash):
        add()
    assert sorted(folder.iterdir()) == before
    discard_unfinished()
    assert [version.reason for version in list_versions(tmp_path)] == [""]


def test_staging_removes_the_folders_of_dead_writers_only(tmp_path: Path) -> None:
    with staging(tmp_path, "tiny") as alive:
        dead = tmp_path / "tiny" / ".staging-dead"
        dead.mkdir()
        (dead / "engine.bin").write_bytes(ENGINE)
        with staging(tmp_path, "tiny") as second:
            assert alive.is_dir()
            assert second.is_dir()
            assert not dead.exists()
        manifest = write_version(alive)
        publish(tmp_path, alive, manifest)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["1"]
