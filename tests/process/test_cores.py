"""The core count respects CPU affinity and the CPU quotas of all control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.process.cores import available_cores
from tests.process.trees import write

GROUP, MOUNTS = "proc/self/cgroup", "proc/self/mountinfo"


def v2(path: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{path}/cpu.max": f"{text}\n"}


def v1(path: str, quota_us: int, mount: str = "sys/fs/cgroup/cpu,cpuacct") -> dict[str, str]:
    return {
        f"{mount}{path}/cpu.cfs_quota_us": f"{quota_us}\n",
        f"{mount}{path}/cpu.cfs_period_us": "100000\n",
    }


def test_this_machine_has_at_least_one_core() -> None:
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8, id="no cgroups"),
        pytest.param({GROUP: "0::/\n"} | v2("", "max 100000"), 8, id="v2, no quota"),
        pytest.param({GROUP: "0::/\n"} | v2("", "250000 100000"), 2, id="v2, container"),
        pytest.param({GROUP: "0::/\n"} | v2("", "50000 100000"), 1, id="v2, half a core"),
        pytest.param({GROUP: "0::/\n"} | v2("", "1600000 100000"), 8, id="v2, more than all"),
        pytest.param(
            {GROUP: "0::/system.slice/convserve.service\n"}
            | v2("/system.slice/convserve.service", "300000 100000"),
            3,
            id="v2, systemd CPUQuota",
        ),
        pytest.param(
            {GROUP: "0::/pods/one/main\n"}
            | v2("/pods/one/main", "max 100000")
            | v2("/pods/one", "400000 100000")
            | v2("/pods", "200000 100000"),
            2,
            id="v2, tightest of the groups above",
        ),
        pytest.param(
            {GROUP: "0::/docker/abc\n"} | v2("", "200000 100000"),
            2,
            id="v2, the container sees its group as the root",
        ),
        pytest.param(
            {GROUP: "0::/../../elsewhere\n"} | v2("", "200000 100000"),
            2,
            id="v2, moved out of the visible tree",
        ),
        pytest.param(
            {GROUP: "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n"}
            | v1("/docker/abc", 350_000),
            3,
            id="v1",
        ),
        pytest.param(
            {GROUP: "4:cpu,cpuacct:/\n"} | v1("", -1),
            8,
            id="v1, no quota",
        ),
        pytest.param(
            {GROUP: "4:cpuacct,cpu:/a\n"} | v1("/a", 200_000, "sys/fs/cgroup/cpu"),
            2,
            id="v1, mounted by the controller's name",
        ),
        pytest.param(
            {
                GROUP: "4:cpu,cpuacct:/docker/abc\n",
                MOUNTS: "40 30 0:33 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - "
                "cgroup cgroup rw,cpu,cpuacct\n",
            }
            | v1("", 200_000),
            2,
            id="v1, the container sees its group as the root",
        ),
        pytest.param(
            {
                GROUP: "1:cpu:/web/one\n0::/\n",
                MOUNTS: "1 0 0:1 / / rw - ext4 /dev/sda rw\n"
                "2 1 0:2 / /mnt/my\\040groups rw shared:1 - cgroup none rw,cpu\n"
                "3 1 0:3 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n",
            }
            | v1("/web/one", 500_000, "mnt/my groups")
            | v1("/web", 300_000, "mnt/my groups"),
            3,
            id="v1 and v2, mounted elsewhere",
        ),
        pytest.param(
            {GROUP: "0::/a\n", MOUNTS: "unreadable\n"} | v2("/a", "broken"),
            8,
            id="unreadable files",
        ),
    ],
)
def test_a_cpu_quota_lowers_the_core_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert available_cores(write(tmp_path, files)) == expected
