"""Links within the repository and the allowed folders are followed, others are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from server.repository.__main__ import main
from server.repository.contents import list_contents
from server.repository.links import printable
from server.repository.reader import open_version, verify_files
from server.repository.serving_config import ServingConfig, read_serving_config
from server.repository.writer import publish, staging
from tests.repository.versions import publish_version, write_version

OUTSIDE = "which is outside the repository; allow a folder above it with --allowed-roots"


def reasons(root: Path, *allowed_roots: Path) -> dict[str, str]:
    """Why each version or other entry is not used, by its path; empty for a valid version."""
    contents = list_contents(root, allowed_roots)
    found = {f"{entry.model}/{entry.version}": entry.reason for entry in contents.versions}
    return found | {str(one.path.relative_to(root)): one.reason for one in contents.ignored}


def check_readable(root: Path, *allowed_roots: Path) -> None:
    """All files of all versions can be read."""
    for entry in list_contents(root, allowed_roots).versions:
        assert entry.manifest is not None, entry.reason
        verify_files(entry.folder, entry.manifest)
        open_version(entry.folder, entry.manifest)


def move_files_to_blobs(version: Path, blobs: Path) -> None:
    """Replaces each file by a link to a file without a telling name, as DVC does."""
    blobs.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(version.iterdir())):
        blob = blobs / f"{version.parent.name}-{number:032x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, version))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside of the repository."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_links_within_the_repository_are_followed(root: Path) -> None:
    store = root / ".store"
    store.mkdir()
    (root / "tiny").rename(store / "any name")
    (root / "tiny").symlink_to(".store/any name")
    (root / "other/1").rename(store / "abc")
    (root / "other/1").symlink_to(store / "abc")
    move_files_to_blobs(store / "abc", store / "blobs")
    assert reasons(root) == {"other/1": "", "tiny/1": ""}
    check_readable(root)


@pytest.mark.parametrize("what", ["tiny", "tiny/1", "tiny/1/engine.bin", "tiny/1/manifest.json"])
def test_a_link_out_of_the_repository_is_refused_unless_its_folder_is_allowed(
    root: Path, elsewhere: Path, what: str
) -> None:
    target = elsewhere / "target"
    (root / what).rename(target)
    (root / what).symlink_to(target)
    name = Path(what).name if what.count("/") == 2 else "it"
    entry = "tiny" if what == "tiny" else "tiny/1"
    expected = f"{name} is a symbolic link to {target}, {OUTSIDE}"
    assert reasons(root) == {"other/1": "", entry: expected}
    assert reasons(root, root / "other")[entry] == expected
    assert reasons(root, elsewhere) == {"other/1": "", "tiny/1": ""}
    check_readable(root, elsewhere)


def test_a_link_to_a_link_is_judged_by_where_it_ends(root: Path, elsewhere: Path) -> None:
    (root / "tiny/1").rename(elsewhere / "1")
    (root / ".there").symlink_to(elsewhere)
    (root / "tiny/1").symlink_to("../.there/1")
    assert reasons(root)["tiny/1"] == f"it is a symbolic link to {elsewhere}/1, {OUTSIDE}"
    (elsewhere / "back").symlink_to(root / ".store")
    (elsewhere / "1").rename(root / ".store")
    (root / "tiny/1").unlink()
    (root / "tiny/1").symlink_to(elsewhere / "back")
    assert reasons(root)["tiny/1"] == ""


def test_a_folder_whose_name_begins_like_the_repository_is_outside(root: Path) -> None:
    beside = root.parent / (root.name + "-old")
    shutil.move(root / "tiny", beside)
    (root / "tiny").symlink_to(beside)
    assert OUTSIDE in reasons(root)["tiny"]


def test_links_that_lead_nowhere_are_reported(root: Path) -> None:
    (root / "lost").symlink_to("/nowhere/at all")
    (root / "round").symlink_to("round")
    (root / "tiny/2").symlink_to("3")
    (root / "tiny/3").symlink_to("2")
    (root / "tiny/1/labels.txt").unlink()
    (root / "tiny/1/labels.txt").symlink_to("gone")
    assert reasons(root) == {
        "lost": "it is a symbolic link to /nowhere/at all, which does not exist",
        "round": "it is a symbolic link that leads to itself",
        "tiny/1": "labels.txt is a symbolic link to gone, which does not exist",
        "tiny/2": "it is a symbolic link that leads to itself",
        "tiny/3": "it is a symbolic link that leads to itself",
        "other/1": "",
    }


def test_a_link_to_a_device_or_a_pipe_is_no_file(root: Path, elsewhere: Path) -> None:
    path = root / "tiny/1/manifest.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert reasons(root, Path("/dev"))["tiny/1"] == "manifest.json is not a regular file"
    path.unlink()
    os.mkfifo(elsewhere / "pipe")
    path.symlink_to(elsewhere / "pipe")
    assert reasons(root, elsewhere)["tiny/1"] == "manifest.json is not a regular file"


def test_the_repository_itself_may_be_a_link(root: Path, elsewhere: Path) -> None:
    link = elsewhere / "current"
    link.symlink_to(root)
    (root / "tiny").rename(root / ".tiny")
    (root / "tiny").symlink_to(root / ".tiny")
    assert reasons(link) == {"other/1": "", "tiny/1": ""}
    check_readable(link)


def test_serving_json_may_be_a_link_within_the_repository(root: Path, elsewhere: Path) -> None:
    text = '{"labels": {"stable": 1}}'
    (elsewhere / "config").write_text(text)
    (root / "tiny/serving.json").symlink_to(elsewhere / "config")
    assert reasons(root)["tiny/serving.json"] == (
        f"serving.json is a symbolic link to {elsewhere}/config, {OUTSIDE}"
    )
    config = ServingConfig(labels={"stable": 1})
    assert list_contents(root, [elsewhere]).configs["tiny"] == config
    assert read_serving_config(root / "tiny") == config


# --- layouts that tools make -----------------------------------------------------------------


def test_a_config_map_mounted_as_a_version(root: Path) -> None:
    """Kubernetes mounts real files below ..TIME, a link ..data to it, and links to the files."""
    version = root / "tiny/1"
    real = version / "..2026_01_02_03_04_05.678"
    real.mkdir()
    for path in [path for path in version.iterdir() if path.is_file()]:
        path.rename(real / path.name)
        path.symlink_to(f"..data/{path.name}")
    (version / "..data").symlink_to(real.name)
    assert reasons(root) == {"other/1": "", "tiny/1": ""}
    check_readable(root)


def test_a_config_map_mounted_as_the_repository_and_its_update(root: Path) -> None:
    for time in ("..1", "..2"):
        (root / time).mkdir()
    (root / "tiny").rename(root / "..1/tiny")
    (root / "..data").symlink_to("..1")
    (root / "tiny").symlink_to("..data/tiny")
    (before,) = [one for one in list_contents(root).versions if one.model == "tiny"]
    shutil.copytree(root / "..1/tiny", root / "..2/tiny")
    (root / "..new").symlink_to("..2")
    (root / "..new").rename(root / "..data")
    (after,) = [one for one in list_contents(root).versions if one.model == "tiny"]
    assert (before.reason, after.reason) == ("", "")
    assert after.manifest == before.manifest


def test_the_cache_of_hugging_face(root: Path) -> None:
    """snapshots/COMMIT holds links to ../../blobs/SHA256."""
    snapshot, blobs = root / "snapshots/0123abc", root / "blobs"
    snapshot.mkdir(parents=True)
    for model in ("tiny", "other"):
        (root / model).rename(snapshot / model)
        move_files_to_blobs(snapshot / model / "1", blobs)
    assert all(OUTSIDE in reason for reason in reasons(snapshot).values())
    assert reasons(snapshot, blobs) == {"other/1": "", "tiny/1": ""}
    check_readable(snapshot, root)


def test_a_replaced_link_gives_a_failed_version_another_chance(root: Path) -> None:
    version = root / "tiny/1"
    move_files_to_blobs(version, root / ".blobs")
    path, good = version / "engine.bin", root / ".blobs/good"
    shutil.copy2(path, good)
    stamps = []
    for target in (path.readlink(), good, good):
        path.unlink()
        path.symlink_to(target)
        stamps.append(list_contents(root).versions[1].stamp)
    good.touch()
    stamps.append(list_contents(root).versions[1].stamp)
    assert len(set(stamps)) == len(stamps)


# --- writers ---------------------------------------------------------------------------------


def test_a_version_is_published_through_a_link(root: Path, elsewhere: Path) -> None:
    (root / "tiny").rename(elsewhere / "tiny")
    (root / "tiny").symlink_to(elsewhere / "tiny")
    with staging(root, "tiny") as staged:
        assert publish(root, staged, write_version(staged)).version == 2
    assert reasons(root, elsewhere) == {"other/1": "", "tiny/1": "", "tiny/2": ""}


def test_gc_removes_links_but_never_what_they_lead_to(root: Path, elsewhere: Path) -> None:
    for _ in range(3):
        publish_version(root)
        publish_version(root, "other")
    (root / "tiny/1").rename(elsewhere / "1")
    (root / "tiny/1").symlink_to(elsewhere / "1")
    (root / "other").rename(elsewhere / "other")
    (root / "other").symlink_to(elsewhere / "other")
    arguments = ["--repo", str(root), "--allowed-roots", str(elsewhere), "gc", "--delete"]
    assert main(arguments) == 0
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["3", "4"]
    assert len(list((elsewhere / "1").iterdir())) == 5
    assert len(list((elsewhere / "other").iterdir())) == 4


# --- names -----------------------------------------------------------------------------------


def test_any_name_is_shown_on_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = b"a\nb\x1b[31m \xff\xe2\x80\xae"
    os.mkdir(os.fsencode(root) + b"/" + name)
    os.symlink(b"/nowhere/" + name, os.fsencode(root) + b"/" + name + b" link")
    shown = r"a\nb\x1b[31m \xff\u202e"
    assert printable(os.fsdecode(name)) == shown
    for arguments in (["list"], ["list", "--json"], ["gc"], ["verify"]):
        assert main(["--repo", str(root), *arguments]) == 0
        text = capsys.readouterr().out
        assert all(line.isprintable() for line in text.splitlines())
        assert (shown.replace("\\", "\\\\") if "--json" in arguments else shown) in text or (
            "list" not in arguments
        )
