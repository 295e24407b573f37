"""Freed memory is kept for later requests, until the process gives it back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.process import allocator

ROOT = Path(__file__).resolve().parent.parent.parent

LARGE_MESSAGES = """
import os, resource, sys
from server.process import allocator

if sys.argv[1] == "kept":
    assert allocator.keep_freed({})

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run(number):
    for _ in range(number):
        messages = [b"x" * (4 << 20) for _ in range(4)]
        del messages

run(3)
before = faults()
run(10)
during = faults() - before
allocator.give_back()
before = faults()
run(1)
print(during, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tests glibc's malloc")
def test_freed_memory_is_reused_until_it_is_given_back() -> None:
    """Each round allocates 4 messages of 4 MiB: thousands of page faults, or nearly none."""
    environment = {name: os.environ[name] for name in os.environ if "MALLOC" not in name}
    found = {}
    for mode in ("kept", "default"):
        command = [sys.executable, "-c", LARGE_MESSAGES, mode]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found[mode] = [int(number) for number in done.stdout.split()]
    pages = 4 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert found["default"][0] > 9 * pages, "glibc returns memory by default"
    assert found["kept"][0] < pages / 10
    assert found["kept"][1] > pages / 2, "it was given back"


def test_malloc_settings_of_the_operator_stay_in_force() -> None:
    assert not allocator.keep_freed({"MALLOC_TRIM_THRESHOLD_": "65536"})
