"""A signal ends a build at once, also as process 1 of a container, and leaves no files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_repo.interruption import Interruption
from server.process.early_signals import STOP_SIGNALS
from tests.support.namespaces import AS_PROCESS_1, child_of, may_unshare

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 60
HANG = "import os, threading\nos.write(1, b'ready\\n')\nthreading.Event().wait()\n"


@contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command and waits for its first line."""
    path = os.pathsep.join([*environment.values(), str(ROOT)])
    variables = {"PYTHONPATH": path, "PATH": os.environ["PATH"]}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    status = process.wait(LIMIT_S)
    assert process.stderr is not None
    return status, process.stderr.read()


@pytest.mark.parametrize("library", ["torch", "rich", "numpy"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_libraries_are_imported_ends_the_build(
    tmp_path: Path, library: str, number: signal.Signals
) -> None:
    (tmp_path / f"{library}.py").write_text(HANG)
    command = [sys.executable, "-m", "model_repo.build", "lenet5"]
    with started(command, libraries=str(tmp_path)) as process:
        process.send_signal(number)
        assert ended(process) == (128 + number, f"stopped by {number.name}\n".encode())


@pytest.mark.skipif(not may_unshare(), reason="needs the right to create a process namespace")
@pytest.mark.parametrize("command", ["model_repo.build", "server.cli"])
def test_process_1_of_a_container_is_ended_too(tmp_path: Path, command: str) -> None:
    (tmp_path / "torch.py").write_text(HANG)
    words = ["build", "lenet5"] if command == "server.cli" else ["lenet5"]
    run = [*AS_PROCESS_1, sys.executable, "-m", command, *words]
    with started(run, libraries=str(tmp_path)) as process:
        os.kill(child_of(process.pid), signal.SIGTERM)
        assert ended(process) == (128 + signal.SIGTERM, b"stopped by SIGTERM\n")


# The main thread computes in C for hours, so Python cannot run its signal handler there.
BUSY_WRITER = """
import hashlib, os, sys
from pathlib import Path
from model_repo.interruption import Interruption
from server.repository import writer
with Interruption() as interruption:
    interruption.before_exit(writer.discard_unfinished)
    with writer.staging(Path(sys.argv[1]), "tiny") as staged:
        (staged / "engine.bin").write_bytes(b"half")
        os.write(1, b"ready\\n")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_during_a_long_computation_ends_the_process_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    root = tmp_path / "new" / "engines"
    with started([sys.executable, "-c", BUSY_WRITER, str(root)]) as process:
        assert [path.name[:9] for path in (root / "tiny").iterdir()] == [".staging-"]
        process.send_signal(number)
        assert ended(process)[0] == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_full_pipe_at_standard_error_does_not_hold_up_the_end(tmp_path: Path) -> None:
    fill = "import os\nos.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 4096)\n"
    fill += "except BlockingIOError: os.set_blocking(2, True)\n"
    (tmp_path / "torch.py").write_text(fill + HANG)
    command = [sys.executable, "-m", "model_repo.build", "lenet5"]
    with started(command, libraries=str(tmp_path)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM


def test_signals_that_the_process_ignores_stay_ignored() -> None:
    code = """
import os, signal
from model_repo.interruption import Interruption
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Interruption():
    os.kill(os.getpid(), signal.SIGHUP)
    print("alive")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"alive\n", b"")


def test_the_end_of_the_build_restores_the_handlers_of_before() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
