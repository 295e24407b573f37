"""The core count respects CPU affinity and the cgroup's CPU quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.process import cores
from server.process.cores import available_cores


def test_this_machine_has_at_least_one_core() -> None:
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        (None, 8),
    ],
)
def test_a_cgroup_quota_lowers_the_core_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores() == expected
