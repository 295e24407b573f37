"""Reads the limits of the control groups that the process belongs to (cgroups, version 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class MemoryFiles(NamedTuple):
    """Names of the files that hold a group's memory limit and use, and of a line in memory.stat."""

    limit: str
    used: str
    cached: str  # inactive file cache, which the kernel frees before it ends a process


MEMORY_V2 = MemoryFiles("memory.max", "memory.current", "inactive_file")
MEMORY_V1 = MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory_bytes(root: Path) -> list[int]:
    """Free bytes of each control group above the process that has a memory limit.

    `root` is the folder that holds proc and sys.
    """
    free = (_free_bytes(group, files) for group, files in _memory_groups(root))
    return [bytes for bytes in free if bytes is not None]


def read_fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file; empty if it can't be read."""
    fields = {}
    try:
        for line in path.read_text().splitlines():
            name, number, *_ = line.split()
            fields[name] = int(number)
    except (OSError, ValueError):
        pass
    return fields


def _memory_groups(root: Path) -> Iterator[tuple[Path, MemoryFiles]]:
    """The process's memory groups, from its own up to the root group."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "0::/path" in version 2, "4:memory:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, files = root / "sys/fs/cgroup", MEMORY_V2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", MEMORY_V1
        else:
            continue
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield group, files
            if group == mount:
                break


def _free_bytes(group: Path, files: MemoryFiles) -> int | None:
    try:
        limit = int((group / files.limit).read_text())
        used = int((group / files.used).read_text())
    except (OSError, ValueError):  # the group is not visible here, or its limit is "max"
        return None
    return limit - used + read_fields(group / "memory.stat").get(files.cached, 0)
