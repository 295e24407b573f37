"""How much memory there is for an engine, and how much it will take: asked before it is loaded.

A version that does not fit would not fail alone: the kernel ends the whole process, with all that
it serves. So the limits of every control group above the process count, not the machine's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from server.process import allocator
from server.repository.manifest import EngineRecord, InvalidVersion

KEPT_FREE_BYTES = 64 << 20  # for all that is not an engine

# Of a compiled network, in bytes of its files: weights are mapped and held once more in the order
# that suits the processor. Where there are several threads two are compiled, see engines.openvino.
# Measured with OpenVINO, VGG-16 in bf16: 2.1 with one thread, 4.2 with two.
WEIGHTS = 2.2
# What a row takes on its way through the network, in rows of its pixels. The largest is VGG-16: two
# layers of 64 channels in two bytes each.
LAYERS = {"null": 1}
USUAL_LAYERS = 24
# An engine on a GPU holds the rows of two instances here, and its file twice while it is loaded: as
# it was read and as the library takes it apart. Its layers are in the device's memory.
GPU_FILES = 2
GPU_INSTANCES = 2


def check_memory(record: EngineRecord, row: tuple[int, int, int], threads: int) -> None:
    """Raises Unsound where an engine would take more than there is."""
    needed, free = needed_bytes(record, row, threads), free_bytes()
    if free is not None and needed + KEPT_FREE_BYTES > free:
        allocator.give_back()  # what this process keeps for calls to come counts as used
        free = free_bytes()
    if free is not None and needed + KEPT_FREE_BYTES > free:
        raise InvalidVersion(
            f"it would take about {needed >> 20} MiB of memory, and {free >> 20} MiB are free, of "
            f"which {KEPT_FREE_BYTES >> 20} are kept so; unload something, or give it more memory"
        )


def needed_bytes(record: EngineRecord, row: tuple[int, int, int], threads: int) -> int:
    """What an engine will take of the host, about; rows are of (height, width, channels) bytes."""
    files = sum(file.bytes for file in record.files)
    row_bytes = math.prod(row)
    if record.backend == "tensorrt" or record.hardware.startswith("cuda"):
        return GPU_FILES * files + GPU_INSTANCES * record.max_batch * row_bytes
    compiled, instances = (2, threads + 1) if threads > 1 else (1, 1)
    layers = LAYERS.get(record.backend, USUAL_LAYERS)
    return round(WEIGHTS * compiled * files + instances * record.max_batch * row_bytes * layers)


def free_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take before the kernel ends it; None where nobody says.

    Memory that only caches files counts as free. `root` is where /proc and /sys are found.
    """
    known = [value for value in (_machine(root), *_groups(root)) if value is not None]
    return max(0, min(known)) if known else None


def _machine(root: Path) -> int | None:
    fields = _fields(root / "proc/meminfo")
    return fields["MemAvailable:"] << 10 if "MemAvailable:" in fields else None


def _groups(root: Path) -> Iterator[int | None]:
    """What is left in each control group above the process, of both versions of Linux's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "0::/path" in version 2, "4:memory:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield _left(group, *names)
            if group == mount:
                break


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        limit_bytes = int((group / limit).read_text())
        used_bytes = int((group / used).read_text())
    except (OSError, ValueError):  # no such group here, or "max": no limit
        return None
    return limit_bytes - used_bytes + _fields(group / "memory.stat").get(cached, 0)


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file."""
    found = {}
    try:
        for line in path.read_text().splitlines():
            name, number, *_ = line.split()
            found[name] = int(number)
    except (OSError, ValueError):
        pass
    return found
