"""Every action of an administrator leaves a line in the audit log."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.api.stubs import open_inference_pb2 as oip
from server.errors import ModelNotFound
from server.security.audit import MAX_DENIED_PER_S, MAX_TARGET, AuditLog
from server.security.caller import IN_PROCESS, Caller
from server.security.peer import Peer
from server.security.principal import STRANGER
from tests.security.credentials import OPERATOR, TEAM_A, bearer
from tests.security.guarded import HIDDEN, OPEN_INFERENCE, SEEN, guarded

ROOT = Path(__file__).resolve().parents[2]
STRANGE = Caller(STRANGER, Peer("203.0.113.5", False, None))


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    found: list[Any] = [one for one in caplog.records if one.message == "admin_action"]
    return [(one.principal, one.peer, one.action, one.target, one.outcome) for one in found]


async def test_allowed_and_denied_actions_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load = oip.RepositoryModelLoadRequest(model_name=SEEN)
    unload = oip.RepositoryModelUnloadRequest(model_name="absent")
    register = oip.SystemSharedMemoryRegisterRequest(name="region", key="/../x", byte_size=1)
    with caplog.at_level(logging.INFO):
        async with guarded(tmp_path, allow_shared_memory=True) as one:
            operator, team = [bearer(OPERATOR)], [bearer(TEAM_A)]
            await one.call(OPEN_INFERENCE + "RepositoryModelLoad", load, operator)
            await one.call(OPEN_INFERENCE + "RepositoryModelUnload", unload, operator)
            await one.call(OPEN_INFERENCE + "SystemSharedMemoryRegister", register, operator)
            await one.rest("POST", f"/v2/repository/models/{HIDDEN}/unload", operator)
            await one.rest("POST", "/v2/systemsharedmemory/unregister", operator)
            await one.call(OPEN_INFERENCE + "RepositoryModelLoad", load, team)
            await one.call(OPEN_INFERENCE + "RepositoryModelLoad", load)
            await one.rest("POST", f"/v2/repository/models/{SEEN}/unload", team)
            await one.rest("GET", f"/v2/models/{SEEN}/ready", team)
    assert lines(caplog) == [
        ("operator", "127.0.0.1", "RepositoryModelLoad", SEEN, "ok"),
        ("operator", "127.0.0.1", "RepositoryModelUnload", "absent", "ModelNotFound"),
        ("operator", "127.0.0.1", "SystemSharedMemoryRegister", "region", "InvalidInput"),
        ("operator", "127.0.0.1", "RepositoryModelUnload", HIDDEN, "ok"),
        ("operator", "127.0.0.1", "SystemSharedMemoryUnregister", "", "ok"),
        ("team-a", "127.0.0.1", "RepositoryModelLoad", "", "Forbidden"),
        ("stranger", "127.0.0.1", "RepositoryModelLoad", "", "Unauthenticated"),
        ("team-a", "127.0.0.1", "RepositoryModelUnload", "", "Forbidden"),
    ]


async def test_actions_without_an_auth_file_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with guarded(tmp_path, "") as one:
            await one.rest("POST", f"/v2/repository/models/{SEEN}/load")
            await one.rest("POST", f"/v2/repository/models/{SEEN}/load", [("via", b"1.1 proxy")])
    assert lines(caplog) == [
        ("anonymous", "127.0.0.1", "RepositoryModelLoad", SEEN, "ok"),
        ("anonymous", "127.0.0.1", "RepositoryModelLoad", "", "Forbidden"),
    ]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ModelNotFound("x"), "ModelNotFound"),
        (RuntimeError("x"), "failed"),
        (asyncio.CancelledError(), "cancelled"),
    ],
    ids=["ServingError", "unexpected", "cancelled"],
)
def test_the_outcome_is_that_of_the_action(
    error: BaseException, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        with AuditLog().action(STRANGE, "RepositoryModelLoad", "m" * 1000):
            raise error

    with caplog.at_level(logging.INFO), pytest.raises(type(error)):
        act()
    shown = ("stranger", "203.0.113.5", "RepositoryModelLoad", "m" * MAX_TARGET, outcome)
    assert lines(caplog) == [shown]


def test_a_flood_of_denied_actions_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "server.security.audit")
    now_s = 1000.0
    monkeypatch.setattr("server.security.audit.time.monotonic", lambda: now_s)
    audit = AuditLog()
    for _ in range(500):
        audit.denied(STRANGE, "RepositoryModelLoad", "Unauthenticated")
    assert len(lines(caplog)) == MAX_DENIED_PER_S
    # The flood does not hide the action of another principal.
    audit.denied(IN_PROCESS, "RepositoryModelUnload", "Forbidden")
    assert lines(caplog)[-1][2] == "RepositoryModelUnload"
    caplog.clear()
    now_s += 1
    audit.denied(STRANGE, "RepositoryModelLoad", "Unauthenticated")
    assert len(lines(caplog)) == 1
    last: Any = caplog.records[-1]
    assert last.left_out == 500 - MAX_DENIED_PER_S


@pytest.mark.parametrize("level", ["debug", "warning", "error"])
def test_the_log_level_does_not_hide_the_audit_log(level: str) -> None:
    code = f"""
from server.telemetry import logs
from server.security.audit import AuditLog
from server.security.caller import IN_PROCESS
logs.configure({level!r}, "text")
with AuditLog().action(IN_PROCESS, "RepositoryModelLoad", "tiny"):
    pass
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count(" admin_action ") == 1
