"""The number of processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from server.process.cgroups import cpu_quota_cores


def available_cores(root: Path = Path("/")) -> int:
    """Cores in the process's CPU affinity, at most its cgroups' CPU quota; at least 1.

    `root` is the folder that holds proc and sys.
    """
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota_cores(root)
    return cores if quota is None else max(1, min(cores, int(quota)))
