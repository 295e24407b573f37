"""Reads the limits of the control groups that the process belongs to (cgroups, version 1 and 2).

A limit holds for a group and for all groups below it. So the process has the tightest limit among
its own group and all groups above it. A container may see only its own group, as the root.

Every function takes `root`, the folder that holds proc and sys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CGROUPS = "sys/fs/cgroup"


class Hierarchy(NamedTuple):
    """A mounted tree of control groups. Version 2 has one for all controllers."""

    mount: Path
    top: PurePosixPath  # the group that is visible as the folder `mount`


class Group(NamedTuple):
    """The folder of a control group. Files and their content depend on the version."""

    folder: Path
    is_v2: bool


class MemoryFiles(NamedTuple):
    """Names of the files that hold a group's memory limit and use, and of a line in memory.stat."""

    limit: str
    used: str
    cached: str  # inactive file cache, which the kernel frees before it ends a process


MEMORY_V2 = MemoryFiles("memory.max", "memory.current", "inactive_file")
MEMORY_V1 = MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory_bytes(root: Path) -> list[int]:
    """Free bytes of each control group of the process that has a memory limit."""
    free = (_free_bytes(group) for group in _groups(root, "memory"))
    return [bytes for bytes in free if bytes is not None]


def cpu_quota_cores(root: Path) -> float | None:
    """Processor time per second that the process may use, in seconds; None without a quota."""
    quotas = (_quota_cores(group) for group in _groups(root, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


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


def _free_bytes(group: Group) -> int | None:
    folder, files = group.folder, MEMORY_V2 if group.is_v2 else MEMORY_V1
    try:
        limit = int((folder / files.limit).read_text())
        used = int((folder / files.used).read_text())
    except (OSError, ValueError):  # the group is not visible here, or its limit is "max"
        return None
    return limit - used + read_fields(folder / "memory.stat").get(files.cached, 0)


def _quota_cores(group: Group) -> float | None:
    try:
        if group.is_v2:
            quota, period = (group.folder / "cpu.max").read_text().split()
        else:
            quota = (group.folder / "cpu.cfs_quota_us").read_text()
            period = (group.folder / "cpu.cfs_period_us").read_text()
        quota_us, period_us = int(quota), int(period)
    except (OSError, ValueError):  # the group is not visible here, or its quota is "max"
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None  # -1: none


def _groups(root: Path, controller: str) -> Iterator[Group]:
    """The process's groups that may limit `controller`, each from its own up to the top."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)  # "0::/path" or "4:cpu,cpuacct:/path"
        is_v2 = not controllers
        if is_v2 or controller in controllers.split(","):
            for hierarchy in _hierarchies(root, "" if is_v2 else controller, controllers):
                for folder in _upwards(hierarchy, PurePosixPath(path)):
                    yield Group(folder, is_v2)


def _hierarchies(root: Path, controller: str, controllers: str) -> list[Hierarchy]:
    """The mounted trees of a controller; an empty controller stands for version 2."""
    mounts = (_mounted(root, line, controller) for line in _lines(root / "proc/self/mountinfo"))
    if mounted := [hierarchy for hierarchy in mounts if hierarchy is not None]:
        return mounted
    names = dict.fromkeys((controllers, controller)) if controller else ("unified", "")
    return [Hierarchy(root / CGROUPS / name, PurePosixPath("/")) for name in names]


def _mounted(root: Path, line: str, controller: str) -> Hierarchy | None:
    """The hierarchy that a line of mountinfo mounts; None for other mounts.

    "32 31 0:29 /top /mount rw - cgroup source rw,cpu,cpuacct"
    """
    try:
        before, after = line.split(" - ", 1)
        top, mount = before.split(" ")[3:5]
        kind, _, options = after.split(" ", 2)
    except ValueError:
        return None
    if kind != ("cgroup" if controller else "cgroup2"):
        return None
    if controller and controller not in options.split(","):
        return None
    return Hierarchy(root / _unescaped(mount).lstrip("/"), PurePosixPath(_unescaped(top)))


def _upwards(hierarchy: Hierarchy, path: PurePosixPath) -> Iterator[Path]:
    """Folders of a group and of the groups above it, as far as the hierarchy shows them.

    A container that shares the host's view sees a path that is not below its mount. Then only the
    mounted group is known to be above the process.
    """
    below = path.relative_to(hierarchy.top) if path.is_relative_to(hierarchy.top) else path
    folder = hierarchy.mount / str(below).lstrip("/")
    if ".." in below.parts:
        folder = hierarchy.mount
    for group in (folder, *folder.parents):
        yield group
        if group == hierarchy.mount:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    r"""A path of mountinfo: the kernel writes blanks as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
