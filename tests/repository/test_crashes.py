"""A reader sees all of a version or nothing, even if writers crash or run at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.repository.contents import list_versions
from server.repository.reader import open_version, verify_files
from tests.repository.versions import publish_version

ROOT = Path(__file__).resolve().parent.parent.parent


class Crash(BaseException):
    """The machine stops at this point."""


def steps(monkeypatch: pytest.MonkeyPatch, stop_at: int | None) -> list[str]:
    """Counts the steps that change the disk, and crashes at number `stop_at`."""
    done: list[str] = []

    def counted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            if len(done) == stop_at:
                raise Crash
            done.append(name)
            return step(*args, **settings)

        return run

    for name in ("fsync", "rename", "chmod", "mkdir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return done


def test_a_crash_at_any_step_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(tmp_path / "whole")
    with monkeypatch.context() as patch:
        taken = steps(patch, None)
        publish_version(tmp_path / "whole")
    assert "rename" in taken
    synced = taken[: taken.index("rename")].count("fsync")
    assert synced == 6, "five files and their folder must be synced"
    for stop_at in range(len(taken)):
        root = tmp_path / str(stop_at)
        publish_version(root, engine=b"old")
        with monkeypatch.context() as patch:
            steps(patch, stop_at)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a crash skips the clean-up
            with pytest.raises(Crash):
                publish_version(root, engine=b"new")
        entries = list_versions(root)
        assert all(entry.manifest for entry in entries), entries
        for entry in entries:
            assert entry.manifest is not None
            verify_files(entry.folder, entry.manifest)
        assert [entry.version for entry in entries] in ([1], [2, 1])
        assert publish_version(root, engine=b"next").version == len(entries) + 1
        assert not list((root / "tiny").glob(".*")), "folders of crashed writers remain"


PUBLISH_FOREVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from tests.repository.versions import publish_version
    print("ready", flush=True)
    while True:
        publish_version(Path(sys.argv[1]), engine=bytes(200_000))
""")


def test_a_killed_publisher_never_leaves_an_invalid_version(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):
        command = [sys.executable, "-c", PUBLISH_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            before = len(list(tmp_path.glob("tiny/[0-9]*")))
            while len(list(tmp_path.glob("tiny/[0-9]*"))) < before + 2:
                assert process.poll() is None
            for _ in range(rng.integers(0, 5_000)):  # at any point of the next publication
                pass
            process.send_signal(signal.SIGKILL)
        entries = list_versions(tmp_path)
        assert len(entries) >= before + 2
        for entry in entries:
            assert entry.manifest is not None, entry.reason
            verify_files(entry.folder, entry.manifest)
    newest = publish_version(tmp_path)
    assert newest.version == len(list_versions(tmp_path))
    assert not list((tmp_path / "tiny").glob(".*"))


def test_concurrent_publishers_get_different_versions(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        published = pool.map(publish_version, [tmp_path] * 24, chunksize=1)
    assert sorted(manifest.version for manifest in published) == list(range(1, 25))
    assert all(entry.manifest for entry in list_versions(tmp_path))


def test_a_reader_never_sees_a_part_of_a_version(tmp_path: Path) -> None:
    publish_version(tmp_path)
    last = 40
    writer = threading.Thread(target=lambda: [publish_version(tmp_path) for _ in range(last - 1)])
    writer.start()
    seen = set()
    while last not in seen:
        assert writer.is_alive() or len(list((tmp_path / "tiny").iterdir())) == last
        for entry in list_versions(tmp_path):
            assert entry.manifest is not None, entry.reason
            if entry.version not in seen:
                verify_files(entry.folder, entry.manifest)
                open_version(entry.folder, entry.manifest)
            seen.add(entry.version)
    writer.join()
    assert seen == set(range(1, last + 1))
