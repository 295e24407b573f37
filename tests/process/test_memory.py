"""Free memory is what the tightest limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.process.memory import free_bytes
from tests.process.trees import write

GIB = 1 << 30


MACHINE = {
    "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Free: 0\n"
}
V2 = {"proc/self/cgroup": "0::/pods/mine\n"}
V1 = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/pods/mine\n1:name=systemd:/x\n"}


def v2(path: str, limit: str, used: int, cached: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon {used - cached}\ninactive_file {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 8 * GIB),
        (MACHINE | V2 | v2("/pods/mine", "max", GIB, 0), 8 * GIB),
        (MACHINE | V2 | v2("/pods/mine", str(4 * GIB), 2 * GIB, GIB), 3 * GIB),
        (  # a group's limit includes its subgroups
            MACHINE
            | V2
            | v2("/pods/mine", str(4 * GIB), GIB, 0)
            | v2("/pods", str(3 * GIB), GIB, 0),
            2 * GIB,
        ),
        # A container sees its own group as the root.
        (MACHINE | {"proc/self/cgroup": "0::/\n"} | v2("", str(GIB), GIB // 2, 0), GIB // 2),
        (MACHINE | V2 | v2("/pods/mine", str(GIB), 2 * GIB, 0), 0),
        (
            MACHINE
            | V1
            | {
                "sys/fs/cgroup/memory/pods/mine/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/pods/mine/memory.usage_in_bytes": str(GIB // 2),
                "sys/fs/cgroup/memory/pods/mine/memory.stat": f"total_inactive_file {GIB // 4}\n",
            },
            GIB * 3 // 4,
        ),
    ],
)
def test_free_memory_is_what_the_tightest_limit_leaves(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    assert free_bytes(write(tmp_path, files)) == free


def test_this_machine_has_free_memory() -> None:
    free = free_bytes()
    assert free is not None
    assert free > 0
