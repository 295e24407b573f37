"""A signal in the first moments ends the server, also as process 1 of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.namespaces import AS_PROCESS_1, child_of, may_unshare

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60
SERVER, COMMAND = ("-m", "server"), ("-m", "server.cli", "serve")

needs_namespaces = pytest.mark.skipif(
    not may_unshare(), reason="needs the right to create a process namespace"
)

# A library whose import never ends.
HANGING_LIBRARY = """
import os, sys, threading
os.write(1, b"importing\\n")
threading.Event().wait()
"""


@pytest.mark.parametrize("library", ["numpy", "grpc", "uvloop", "PIL", "google", "uvicorn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_libraries_are_imported_exits_with_status_0(
    tmp_path: Path, library: str, number: signal.Signals
) -> None:
    assert stopped_while_importing(tmp_path, library, number, SERVER) == 0


@needs_namespaces
@pytest.mark.parametrize("run", [SERVER, COMMAND], ids=["server", "convserve serve"])
def test_process_1_exits_with_status_0_too(tmp_path: Path, run: Sequence[str]) -> None:
    found = stopped_while_importing(tmp_path, "numpy", signal.SIGTERM, run, AS_PROCESS_1)
    assert found == 0


@needs_namespaces
@pytest.mark.parametrize(
    ("command", "library"), [("repo", "numpy"), ("bench", "grpc"), ("classify", "grpc")]
)
def test_other_commands_exit_as_process_1_with_the_status_of_the_signal(
    tmp_path: Path, command: str, library: str
) -> None:
    run = ("-m", "server.cli", command)
    found = stopped_while_importing(tmp_path, library, signal.SIGTERM, run, AS_PROCESS_1)
    assert found == 128 + signal.SIGTERM


def stopped_while_importing(
    folder: Path,
    library: str,
    number: signal.Signals,
    run: Sequence[str],
    prefix: Sequence[str] = (),
) -> int:
    """The exit status of a process that gets a signal while it imports a library."""
    (folder / f"{library}.py").write_text(HANGING_LIBRARY)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "clients")])
    environment = {"PYTHONPATH": path, "PATH": os.environ["PATH"]}
    command = [*prefix, sys.executable, *run]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == b"importing\n"
            os.kill(child_of(started.pid) if prefix else started.pid, number)
            return started.wait(LIMIT_S)
        finally:
            started.kill()
