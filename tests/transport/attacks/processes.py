"""The processes of an attack: server, attackers, and an echo that shows the machine's noise."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.support.tls_files import Client, issue_server, write

ROOT = Path(__file__).resolve().parent.parent.parent.parent
START_S = 60.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

ECHO = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    client = listener.accept()[0]
    while data := client.recv(64):
        client.sendall(data)
"""


@dataclass
class ServerProcess:
    """A server in a process of its own, and what it uses."""

    process: subprocess.Popen[bytes]
    port: int
    http_port: int | None
    log: Path
    tls: ssl.SSLContext | None = None  # for its clients, if it speaks TLS

    def resident_bytes(self) -> int:
        return self._memory("VmRSS")

    def peak_bytes(self) -> int:
        """The most since `reset_peak`."""
        return self._memory("VmHWM")

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def log_lines(self) -> int:
        with self.log.open("rb") as lines:
            return sum(1 for _ in lines)

    def _memory(self, name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
        raise AssertionError(f"the process {self.process.pid} has ended")


@contextmanager
def running(command: Sequence[str], log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process, which is killed at the end."""
    with (
        open(log, "wb") if log else nullcontext() as errors,
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def convserve(repo: Path, *options: str, tls: bool = False) -> Iterator[ServerProcess]:
    """`python -m server`, once its models are ready; with `tls` both ports speak TLS."""
    command = ("-m", "server", "--repo", str(repo), "--host=127.0.0.1", "--port=0", "--http-port=0")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        context = None
        if tls:
            authority = trustme.CA()
            context = Client(authority).context("h2")
            files = write(Path(folder), issue_server(authority))
            options = (*options, f"--tls-cert={files.certificate}", f"--tls-key={files.key}")
        with running((*command, "--log-format=json", *options), log) as process:
            ports: dict[str, Any] = {}
            ends_s = time.monotonic() + START_S
            loaded = set[str]()
            while not ports or not loaded:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends_s, log.read_text()
                time.sleep(0.02)
                for text in log.read_text().splitlines():
                    line = json.loads(text)
                    if line["event"] == "listening":
                        ports = line
                    elif line["event"] == "version_loaded":
                        loaded.add(line["model"])
            yield ServerProcess(process, ports["port"], ports["http_port"], log, context)


@contextmanager
def grpcio_server() -> Iterator[ServerProcess]:
    """grpcio's own asyncio server with the same methods."""
    command = ("-m", "tests.transport.attacks.grpcio_server")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with running(command, log) as process:
            assert process.stdout is not None
            port = process.stdout.readline()
            assert port, log.read_text()
            yield ServerProcess(process, int(port), None, log)


@contextmanager
def echo() -> Iterator[int]:
    """The port of a process that sends back what it gets, to one client after the other."""
    with running(("-c", ECHO)) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


class Attacker:
    """A process that runs one attack at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.effort: dict[str, int] = {}

    def start(self, name: str, port: int, seconds: float) -> threading.Thread:
        """Runs the attack. The thread ends with it, and `effort` says what it did."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {port} {seconds}\n".encode())
        self._process.stdin.flush()
        waits = threading.Thread(target=self._wait)
        waits.start()
        return waits

    def _wait(self) -> None:
        assert self._process.stdout is not None
        self.effort = json.loads(self._process.stdout.readline())


@contextmanager
def attacker() -> Iterator[Attacker]:
    with running(("-m", "tests.transport.attacks.attacker")) as process:
        yield Attacker(process)
