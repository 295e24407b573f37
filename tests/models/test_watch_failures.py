"""A watch that fails is replaced by polling; no name on disk ends the server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.models import watcher
from tests.support.serving import publish, serve
from tests.support.versions import wait_for_states

FELL_BACK = "watch_fell_back_to_polling"


class RustPanic(BaseException):
    """Like the exception of a panic in Rust code, which is not an Exception."""


@pytest.fixture
def fast_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "RESCAN_S", 0.05)


def fallbacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The reasons in the log for which the watcher fell back to polling."""
    return [vars(record)["reason"] for record in caplog.records if record.msg == FELL_BACK]


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("OS file watch limit reached."), "OS file watch limit reached."),
        (ExceptionGroup("unhandled", [RuntimeError("odd")]), "odd"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "surrogates"),
        (BaseExceptionGroup("unhandled", [RustPanic("index out of bounds")]), "index out of"),
        (RustPanic(), "RustPanic"),
    ],
    ids=["limit", "group", "path", "panic in a group", "panic"],
)
async def test_without_notifications_the_repository_is_polled_and_the_log_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    reason: str,
) -> None:
    attempts = []

    def no_watches(*arguments: Any, **options: Any) -> Any:
        attempts.append(arguments)
        raise error

    monkeypatch.setattr(watcher, "awatch", no_watches)
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        publish(tmp_path)
        await wait_for_states(served, {2: "READY"})
        while len(attempts) < 5:
            await asyncio.sleep(0.01)
    (logged,) = fallbacks(caplog)
    assert reason in logged


def make_file(path: bytes) -> None:
    with open(path, "wb"):
        pass


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize("make", [make_file, os.mkdir], ids=["file", "folder"])
@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b".hidden-\xe4", b"tiny/\xfc", b"tiny/1/\x80", b"a\nb\x1b[31m\xff"]
)
async def test_a_name_that_is_not_utf8_does_not_end_the_server(
    tmp_path: Path, name: bytes, make: Callable[[bytes], None]
) -> None:
    publish(tmp_path)
    path = os.path.join(os.fsencode(tmp_path), name)
    make(path + b"-before")
    async with serve(tmp_path, bake_time_s=0.0) as served:
        make(path)
        publish(tmp_path)
        await wait_for_states(served, {2: "READY"})
        make(path + b"-later")
        publish(tmp_path)
        await wait_for_states(served, {3: "READY"})


@pytest.mark.usefixtures("fast_polling")
async def test_a_repository_whose_path_is_not_utf8_is_watched(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xf6\xdfe und mehr"))
    publish(root)
    async with serve(root, bake_time_s=0.0) as served:
        publish(root)
        await wait_for_states(served, {2: "READY"})


@pytest.mark.usefixtures("fast_polling")
async def test_a_repository_that_can_not_be_listed_keeps_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)
    async with serve(tmp_path, bake_time_s=0.0) as served:
        attempts = []

        def broken(root: Path, allowed_roots: Sequence[Path]) -> Any:
            attempts.append(root)
            raise ValueError("a bug")

        monkeypatch.setattr(watcher, "list_contents", broken)
        while len(attempts) < 3:
            await asyncio.sleep(0.01)
        await wait_for_states(served, {1: "READY"})
        monkeypatch.undo()
    (record,) = [one for one in caplog.records if one.msg == watcher.UNREADABLE]
    assert vars(record)["reason"] == "ValueError: a bug"
    assert record.exc_info


@pytest.mark.usefixtures("fast_polling")
async def test_an_ignored_entry_is_logged_once_while_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path)

    def logged() -> list[str]:
        return [vars(one)["path"] for one in caplog.records if one.msg == "entry_ignored"]

    async with serve(tmp_path, bake_time_s=0.0) as served:
        entries = [tmp_path / f"Not A Model {number}" for number in range(watcher.MAX_FAILURES * 2)]
        for entry in entries:
            entry.mkdir()
        publish(tmp_path)
        await wait_for_states(served, {2: "READY"})
        publish(tmp_path)
        await wait_for_states(served, {3: "READY"})
        assert sorted(logged()) == sorted(map(str, entries))
        entries[0].rmdir()
        publish(tmp_path)
        await wait_for_states(served, {4: "READY"})
        entries[0].mkdir()
        publish(tmp_path)
        await wait_for_states(served, {5: "READY"})
        assert len(logged()) == len(entries) + 1
