"""How much memory the process may still allocate."""

from __future__ import annotations

from pathlib import Path

from server.process.cgroups import free_memory_bytes, read_fields


def free_bytes(root: Path = Path("/")) -> int | None:
    """Bytes the process may allocate before the kernel ends it; None if the system does not say.

    The smallest of what is free on the machine and in each control group above the process. Memory
    that only caches files counts as free. `root` is the folder that holds proc and sys.
    """
    known = free_memory_bytes(root)
    fields = read_fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        known.append(fields["MemAvailable:"] << 10)
    return max(0, min(known)) if known else None
