"""A bare engine under full load, as a reference for servers. Needs no gRPC."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import median

from server.engines.base import Instance, Outputs
from server.repository.contents import VersionEntry, list_versions


def keep_busy(group: Sequence[Instance], rows: int, seconds: float) -> tuple[float, float]:
    """Keeps every instance of the group busy. Returns images/s and the median seconds per batch."""
    finished: SimpleQueue[tuple[Instance, Outputs | Exception]] = SimpleQueue()
    started: dict[int, float] = {}

    def start(instance: Instance) -> None:
        started[id(instance)] = time.perf_counter()
        instance.start(rows, lambda outcome: finished.put((instance, outcome)))

    began_s = time.perf_counter()
    for instance in group:
        start(instance)
    durations: list[float] = []
    running = len(group)
    ended_s = began_s
    while running:
        instance, outcome = finished.get()
        if isinstance(outcome, Exception):
            raise outcome
        ended_s = time.perf_counter()
        durations.append(ended_s - started[id(instance)])
        if ended_s - began_s < seconds:
            start(instance)
        else:
            running -= 1
    return len(durations) * rows / (ended_s - began_s), median(durations)


def newest_version(repo: Path, model: str) -> VersionEntry:
    """The version that a server would serve."""
    for version in list_versions(repo):
        if version.model == model and version.manifest is not None:
            return version
    raise SystemExit(f"bench: {repo} has no valid version of {model}")


def processor() -> str:
    """The name of this machine's processor, as its maker writes it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
