"""Every entry of a repository is listed as valid, invalid or ignored, with a reason."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.repository.contents import list_ignored, list_versions
from server.repository.manifest import InvalidVersion
from server.repository.reader import read_manifest, verify_files
from tests.repository.versions import invalid_reason, publish_version


def test_a_missing_file_is_reported(root: Path) -> None:
    for name in ("model.onnx", "golden.npz", "labels.txt", "engine.bin"):
        (root / "tiny" / "1" / name).rename(root / name)
        assert invalid_reason(root) == f"{name} is missing"
        (root / name).rename(root / "tiny" / "1" / name)


def test_a_truncated_file_is_reported(root: Path) -> None:
    os.truncate(root / "tiny" / "1" / "engine.bin", 100)
    assert invalid_reason(root) == "engine.bin has 100 bytes; 6000 were published"


def test_a_link_a_folder_or_a_pipe_in_place_of_a_file_is_reported(root: Path) -> None:
    for name in ("engine.bin", "manifest.json"):
        path, aside = root / "tiny" / "1" / name, root / "aside"
        path.rename(aside)
        for make in (
            lambda path: path.symlink_to(root / "tiny"),
            lambda path: path.mkdir(),
            lambda path: os.mkfifo(path),
        ):
            make(path)
            assert invalid_reason(root) == f"{name} is not a regular file"
            path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        aside.rename(path)


def test_a_file_or_another_version_named_like_a_version_is_reported(root: Path) -> None:
    (root / "tiny" / "2").write_text("a file")
    (root / "tiny" / "3").symlink_to(root / "tiny" / "1")
    assert invalid_reason(root, version=2) == "it is not a folder"
    assert invalid_reason(root, version=3) == (
        "manifest.json is of tiny version 1, but the folder is tiny/3"
    )


def test_entries_with_other_names_are_ignored_with_a_reason(root: Path) -> None:
    valid = list_versions(root)
    os.mkdir(os.fsencode(root) + b"/tiny/\xff\xfe")
    invalid_names = ("0", "01", "-1", "1.0", "v2", "١", "9" * 19, "9" * 200, "latest")
    for name in invalid_names:
        (root / "tiny" / name).mkdir()
    (root / "tiny" / "newest").symlink_to(root / "tiny" / "1")
    (root / "tiny" / "notes.txt").write_text("files are not reported")
    (root / "README").write_text("files are not reported")
    (root / ".git").mkdir()
    (root / "tiny" / ".staging-x").mkdir()
    (root / "Upper Case" / "1").mkdir(parents=True)
    (root / "link").symlink_to(root / "nowhere")
    (root / "README.link").symlink_to("README")
    (root / "empty").mkdir()
    assert list_versions(root) == valid
    reasons = {os.fsencode(entry.path.name): entry.reason for entry in list_ignored(root)}
    rule = "a version must be named by a whole number from 1, of at most 18 digits"
    named = [os.fsencode(name) for name in (*invalid_names, "newest")]
    assert reasons == dict.fromkeys([*named, b"\xff\xfe"], rule) | {
        b"Upper Case": "the name of a model must match [a-z0-9][a-z0-9_.-]{0,63}",
        b"link": f"it is a symbolic link to {root}/nowhere, which does not exist",
    }


@pytest.fixture
def restricted() -> Iterator[Path]:
    """A repository in which some files will be made unreadable."""
    with tempfile.TemporaryDirectory() as folder:  # other users can't read pytest's folders
        root = Path(folder)
        root.chmod(0o755)
        for model in ("closed", "other", "tiny"):
            publish_version(root, model)
        yield root
        (root / "closed").chmod(0o755)


class unprivileged:
    """Drops the rights of root, if the tests run as root."""

    def __enter__(self) -> None:
        self._user = os.geteuid()
        if self._user == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(self._user)


def test_missing_permissions_are_reported(restricted: Path) -> None:
    engine = restricted / "tiny" / "1"
    (engine / "manifest.json").chmod(0)
    (restricted / "closed").chmod(0)
    with unprivileged():
        assert invalid_reason(restricted) == "manifest.json can't be read: Permission denied"
        assert [entry.model for entry in list_versions(restricted)] == ["other", "tiny"]
        (ignored,) = list_ignored(restricted)
        assert ignored == (restricted / "closed", "it can't be read: Permission denied")
    (engine / "manifest.json").chmod(0o644)
    (engine / "engine.bin").chmod(0)
    with unprivileged(), pytest.raises(InvalidVersion, match=r"engine\.bin can't be read"):
        verify_files(engine, read_manifest(engine))


def test_a_missing_repository_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_versions(tmp_path / "nowhere")
    assert list_versions(tmp_path) == []
