"""What the C library does with memory that was freed: it is kept for the next call's pixels.

Left to itself glibc gives what large calls freed back to the system at once, and gets it again for
the next ones a page at a time, each of which the kernel fills with zeros first. Measured with eight
images of 224 x 224 a call (1.2 MB): 400 page faults and 1.48 ms of processor time a call, 0.62 ms
with what is kept here; with 64 images a call 14.3 and 6.0 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# glibc's own way, which moves with what is freed, ends at 32 and 64 MiB: it takes a freed piece of
# 32 MiB to get there. Of 64 images a call, 32 and 64 MiB kept cost 14 and 6.8 ms, 128 and 256 6.0.
KEPT_BYTES = 128 << 20  # at the end of the heap
MAPPED_BYTES = 32 << 20  # and more at a time come from the system, and go back to it; glibc's most
# What an operator says of the same in the environment goes before.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed(environment: Mapping[str, str]) -> bool:
    """Has freed memory kept from now on; whether the C library does as it is told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None or any(name in environment for name in SETTINGS):
        return False
    return bool(mallopt(MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(TRIM_THRESHOLD, KEPT_BYTES))


def give_back() -> None:
    """Gives to the system what is kept. Who allocates meanwhile waits, for some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
