"""Reads the auth file again when it changes, and ends what its tokens no longer allow."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from server.errors import CannotServe
from server.security.identity.auth_file import Identities, InvalidAuthFile, parse_auth_file
from server.security.identity.authenticator import FileAuthenticator

log = logging.getLogger(__name__)

# A poll reads the whole file. So it sees every kind of change: edits, renames, Kubernetes' links.
POLL_S = 1.0
MIN_PAUSE_S = 0.01
SETTLE_S = 0.1  # in which a new content must not change


class AuthFile:
    """The content of a file, and whether it can be used."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises CannotServe if it can't be used."""
        self.path = path
        self._data: bytes | None = None
        self._broken: tuple[bytes, InvalidAuthFile] | None = None  # the last broken content
        try:
            identities = self._parse(path.read_bytes())
        except (OSError, InvalidAuthFile) as error:
            raise CannotServe(f"--auth: {_reason(path, error)}") from None
        assert identities is not None, "the first content is new"
        self.identities = identities
        _warn_of_permissions(path)

    def reload(self) -> Identities | None:
        """The new content; None if there is none. Raises OSError, InvalidAuthFile.

        Blocks. A content that still changes is left to a later call: half a file may be valid.
        """
        data = self.path.read_bytes()
        if data != self._data and not self._is_broken(data):
            time.sleep(SETTLE_S)
            if self.path.read_bytes() != data:
                return None
        identities = self._parse(data)
        if identities is not None:
            self.identities = identities
            _warn_of_permissions(self.path)
        return identities

    def _is_broken(self, data: bytes) -> bool:
        """Whether this is the last broken content."""
        return self._broken is not None and data == self._broken[0]

    def _parse(self, data: bytes) -> Identities | None:
        if data == self._data:
            return None
        if self._broken is not None and data == self._broken[0]:
            raise self._broken[1]
        try:
            identities = parse_auth_file(data)
        except InvalidAuthFile as error:
            self._broken = data, error
            raise
        self._data = data
        return identities


class AuthFileWatcher:
    """Gives an authenticator each new content of the file. A broken one is not used.

    `on_change` is called when callers may have lost a permission: after a reload, and when a token
    has expired. `set_valid` is told whether the content on disk is in use. The owner runs `run` in
    a task and cancels it.
    """

    def __init__(
        self,
        file: AuthFile,
        authenticator: FileAuthenticator,
        on_change: Callable[[], None],
        set_valid: Callable[[bool], None],
    ) -> None:
        self._file = file
        self._authenticator = authenticator
        self._on_change = on_change
        self._set_valid = set_valid
        self._problem = ""  # the last one that was logged
        self._expiries_s = _expiries_after(time.time(), file.identities)
        set_valid(True)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s())
            has_changed = await self._reload()
            if has_changed or self._has_expired():
                self._on_change()

    def _pause_s(self) -> float:
        """Seconds to the next poll; shorter if a token expires before it."""
        if not self._expiries_s:
            return POLL_S
        return min(POLL_S, max(MIN_PAUSE_S, self._expiries_s[-1] - time.time()))

    async def _reload(self) -> bool:
        """Whether the file has a new content that is in use now."""
        try:
            identities = await asyncio.to_thread(self._file.reload)
        except (OSError, InvalidAuthFile) as error:
            problem = _reason(self._file.path, error)
            if problem != self._problem:
                log.warning("auth_file_refused", extra={"reason": problem, "action": "old kept"})
            self._problem = problem
            self._set_valid(False)
            return False
        if self._problem or identities is not None:
            log.info("auth_file_loaded", extra=fields_of(self._file))
        self._problem = ""
        self._set_valid(True)
        if identities is None:
            return False
        self._authenticator.replace(identities)
        self._expiries_s = _expiries_after(time.time(), identities)
        return True

    def _has_expired(self) -> bool:
        """Whether a token has expired since the last call."""
        now_s, has_expired = time.time(), False
        while self._expiries_s and self._expiries_s[-1] <= now_s:
            self._expiries_s.pop()
            has_expired = True
        return has_expired


def fields_of(file: AuthFile) -> dict[str, str | int]:
    """What the log says about a file that is in use."""
    identities = file.identities
    return {
        "path": str(file.path),
        "principals": len(identities.principals),
        "tokens": len(identities.tokens),
        "certificates": len(identities.certificates),
    }


def _expiries_after(now_s: float, identities: Identities) -> list[float]:
    """The times when tokens expire, the next one last."""
    times: Iterable[float] = (token.expires_s for token in identities.tokens.values())
    return sorted((one for one in times if now_s < one < float("inf")), reverse=True)


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{path}: can't be read: {error.strerror or error}"
    return f"{path}: {error}"


def _warn_of_permissions(path: Path) -> None:
    """Warns if other users can read the file, which shows who has access, or even write it."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning(
            "auth_file_open_to_others",
            extra={"path": str(path), "mode": f"{mode:04o}", "action": "chmod o-rwx"},
        )
