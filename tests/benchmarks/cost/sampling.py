"""CPU time of each thread from /proc, and stack samples from py-spy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")
THREAD = re.compile(r"thread \((?P<id>\d+)\)(?:: (?P<name>.*))?$")

RATE_HZ = 200


class Frame(NamedTuple):
    """A running function and its current line."""

    function: str
    file: str
    line: int


class Stack(NamedTuple):
    """Frames of a thread, the innermost last, and how many samples saw them."""

    thread: int
    name: str  # the thread's name in Python; empty if Python did not start the thread
    frames: Sequence[Frame]
    samples: int


def parse_samples(raw: str) -> list[Stack]:
    """Parses the output of py-spy in its format `raw` with threads."""
    found = []
    for line in raw.splitlines():
        text, _, samples = line.rpartition(" ")
        first, *rest = text.split(";")
        if (thread := THREAD.match(first)) is None:
            continue
        frames = [
            Frame(frame["function"], frame["file"], int(frame["line"] or 0))
            for part in rest
            if (frame := FRAME.match(part))
        ]
        found.append(Stack(int(thread["id"]), thread["name"] or "", frames, int(samples)))
    return found


def thread_times_s(pid: int) -> dict[int, float]:
    """CPU seconds, user and system, of each thread of a process and of its child processes."""
    processes, found, tick_s = [pid], dict[int, float](), 1 / os.sysconf("SC_CLK_TCK")
    while processes:
        for task in Path(f"/proc/{processes.pop()}/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                processes += map(int, (task / "children").read_text().split())
            except OSError:  # the thread has ended
                continue
            found[int(task.name)] = (int(fields[11]) + int(fields[12])) * tick_s
    return found


def time_between(before: Mapping[int, float], after: Mapping[int, float]) -> Counter[int]:
    """Seconds of each thread between two readings."""
    return Counter({thread: now - before.get(thread, 0.0) for thread, now in after.items()})


class ProfilerUnavailable(Exception):
    """py-spy is not installed or has no permission; the message says which."""


class Profiler:
    """py-spy, attached to one process."""

    def __init__(self, pid: int) -> None:
        in_environment = Path(sys.executable).parent / "py-spy"
        command = str(in_environment) if in_environment.exists() else shutil.which("py-spy")
        if command is None:
            raise ProfilerUnavailable("py-spy is not installed")
        self._command, self._pid = command, pid

    def thread_names(self) -> dict[int, str]:
        """Names of the process's Python threads, by the thread id of the system."""
        listed = json.loads(self._run("dump", "--json"))
        return {one["os_thread_id"]: one["thread_name"] or "" for one in listed}

    def stacks(self, seconds: float) -> list[Stack]:
        """Samples of all running threads during the next `seconds`."""
        with tempfile.TemporaryDirectory(prefix="bench-cost-") as folder:
            raw = Path(folder) / "raw"
            self._run(
                *("record", "--format", "raw", "--threads", "--full-filenames"),
                *("--rate", str(RATE_HZ), "--duration", f"{seconds:.0f}", "--output", str(raw)),
            )
            return parse_samples(raw.read_text())

    def _run(self, subcommand: str, *options: str) -> str:
        command = [self._command, subcommand, "--pid", str(self._pid), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ProfilerUnavailable(f"py-spy failed: {lines[0] if lines else done.returncode}")
        return done.stdout
