"""The auth file is read again when it changes; a broken one is not used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.errors import CannotServe, Unauthenticated
from server.security.identity.auth_watcher import AuthFile, AuthFileWatcher
from server.security.identity.authenticator import FileAuthenticator
from server.security.identity.failure_limit import FailureLimit
from server.security.identity.tokens import NewToken, new_token
from server.security.peer import Peer
from tests.security.credentials import OPERATOR, TEAM_A, auth_file, token_lines

OTHER = new_token()
PRINCIPAL_ONLY = '[principals.team-a]\nroles = ["classify"]\n'
PEER = Peer("203.0.113.5", False, None)


class Watched:
    """A file under watch, and what the watcher reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changes: asyncio.Queue[str] = asyncio.Queue()
        self.validity: asyncio.Queue[bool] = asyncio.Queue()
        self._is_valid: bool | None = None
        file = AuthFile(path)
        self._authenticator = FileAuthenticator(file.identities, FailureLimit(0))
        self._watcher = AuthFileWatcher(
            file, self._authenticator, lambda: self.changes.put_nowait("change"), self._set_valid
        )

    def _set_valid(self, is_valid: bool) -> None:
        if is_valid is not self._is_valid:
            self._is_valid = is_valid
            self.validity.put_nowait(is_valid)

    def reason(self, token: NewToken) -> str:
        """Why a token is refused; empty if it is right."""
        header = (b"authorization", b"Bearer " + token.text.encode())
        try:
            self._authenticator.identify([header], PEER)
        except Unauthenticated as error:
            return error.reason
        return ""

    @classmethod
    @asynccontextmanager
    async def watching(cls, path: Path) -> AsyncIterator[Watched]:
        watched = cls(path)
        task = asyncio.create_task(watched._watcher.run())
        try:
            async with asyncio.timeout(30):
                assert await watched.validity.get()
                yield watched
        finally:
            task.cancel()


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[Any]:
    return [record for record in caplog.records if record.message == name]


async def test_a_new_content_is_used(tmp_path: Path) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(auth_file())
    async with Watched.watching(path) as watched:
        assert watched.reason(OPERATOR) == ""
        path.write_text(auth_file().replace(OPERATOR.id, "0" * 16))
        await watched.changes.get()
        assert watched.reason(OPERATOR) == "unknown_token"
        assert watched.reason(TEAM_A) == ""


async def test_the_links_of_a_kubernetes_secret_are_followed(tmp_path: Path) -> None:
    for name, text in (("..1", auth_file()), ("..2", auth_file().replace(TEAM_A.id, "0" * 16))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "auth.toml").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "auth.toml"
    path.symlink_to("..data/auth.toml")
    async with Watched.watching(path) as watched:
        assert watched.reason(TEAM_A) == ""
        (tmp_path / "..new").symlink_to("..2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await watched.changes.get()
        assert watched.reason(TEAM_A) == "unknown_token"


@pytest.mark.parametrize("damage", ["syntax", "field", "gone", "empty tables", "a folder"])
async def test_a_broken_file_leaves_the_old_content_in_use(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(auth_file())
    async with Watched.watching(path) as watched:
        with caplog.at_level(logging.INFO):
            if damage in ("gone", "a folder"):
                path.unlink()
                if damage == "a folder":
                    path.mkdir()
            else:
                broken = {"syntax": "x = = 1", "field": "[principals.a]\nrole = 1"}
                path.write_text(broken.get(damage, "[principals]\na = 1"))
            assert not await watched.validity.get()
            assert watched.reason(TEAM_A) == ""
            (refused,) = events(caplog, "auth_file_refused")
            assert refused.levelname == "WARNING"
            assert str(path) in refused.reason
            if damage == "a folder":
                path.rmdir()
            path.write_text(auth_file() + token_lines("team-a", OTHER))
            assert await watched.validity.get()
        assert watched.reason(OTHER) == ""
        assert watched.changes.qsize() == 1
        assert len(events(caplog, "auth_file_refused")) == 1  # not with every poll


def test_a_half_written_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(auth_file())
    whole = path.read_bytes()
    file = AuthFile(path)
    path.write_text(PRINCIPAL_ONLY)  # valid, but without the tokens
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda seconds: path.write_bytes(whole))
        assert file.reload() is None
    assert file.reload() is None
    path.write_text(PRINCIPAL_ONLY)
    identities = file.reload()
    assert identities is not None
    assert not identities.tokens


async def test_the_end_of_a_token_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "auth.toml"
    ends = datetime.now(UTC) + timedelta(seconds=0.7)
    path.write_text(auth_file() + token_lines("team-a", OTHER, ends.isoformat()))
    async with Watched.watching(path) as watched:
        await watched.changes.get()
        assert datetime.now(UTC) >= ends
        assert watched.reason(OTHER) == "expired"
        assert watched.changes.empty()


def test_a_broken_file_at_the_start_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "auth.toml"
    with pytest.raises(CannotServe, match=f"--auth: {path}: can't be read: No such file"):
        AuthFile(path)
    path.write_text("a = 1\nb = = 2")
    with pytest.raises(CannotServe, match=rf"--auth: {path}: is not TOML: .*\(at line 2, column 5"):
        AuthFile(path)
    path.write_text("[principals.a]")
    with pytest.raises(CannotServe, match="principals.a: Object missing required field `roles`"):
        AuthFile(path)


@pytest.mark.parametrize(
    ("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)]
)
def test_a_file_that_others_can_read_or_write_causes_a_warning(
    tmp_path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "auth.toml"
    path.write_text(auth_file())
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        AuthFile(path)
    assert len(events(caplog, "auth_file_open_to_others")) == warns
