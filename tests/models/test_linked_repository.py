"""A server follows symbolic links in its repository, and sees when they change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.errors import CannotServe
from server.models import watcher
from server.models.startup import models_to_serve
from server.settings import Settings
from tests.support.serving import publish, serve
from tests.support.versions import reasons, states, wait_for_states


async def test_an_update_of_a_config_map_is_seen_without_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "RESCAN_S", 1000.0)
    old, new = tmp_path / "..1", tmp_path / "..2"
    publish(old)
    shutil.copytree(old, new)
    publish(new)
    (tmp_path / "..data").symlink_to(old.name)
    (tmp_path / "tiny").symlink_to("..data/tiny")
    async with serve(tmp_path, bake_time_s=0.0) as served:
        assert await states(served) == {1: "READY"}
        (tmp_path / "..data_tmp").symlink_to(new.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await wait_for_states(served, {1: "UNLOADED", 2: "READY"})


async def test_links_lead_into_allowed_roots_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "RESCAN_S", 0.05)
    root, allowed, other = (tmp_path / name for name in ("repository", "allowed", "other"))
    for folder in (root, allowed, other):
        publish(folder)
    publish(other)
    async with serve(root, bake_time_s=0.0, allowed_roots=f"{allowed}, {root}") as served:
        (root / "tiny/2").symlink_to(other / "tiny/2")
        await wait_for_states(served, {1: "READY", 2: "FAILED"})
        assert (await reasons(served))[2] == (
            f"it is a symbolic link to {other}/tiny/2, which is outside the repository; "
            "allow a folder above it with --allowed-roots"
        )
        (other / "tiny/2").rename(allowed / "tiny/2")
        (root / "tiny/2").unlink()
        (root / "tiny/2").symlink_to(allowed / "tiny/2")
        await wait_for_states(served, {1: "UNLOADED", 2: "READY"})


def test_an_allowed_root_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(CannotServe, match="allowed_roots has nowhere, which is not a folder"):
        models_to_serve(Settings(repo=tmp_path, allowed_roots=f"{tmp_path},nowhere"))
