"""Runs a command as process 1, as in a container."""

from __future__ import annotations

import subprocess
from functools import cache

# With --kill-child the command ends when `unshare` is killed.
AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child")


@cache
def may_unshare() -> bool:
    """Whether this machine lets the tests start a process 1; usually root may."""
    try:
        return subprocess.run([*AS_PROCESS_1, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def child_of(process: int) -> int:
    """The id of the only child, which `unshare` has started."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        return int(file.read())
