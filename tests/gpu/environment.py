"""The environment of a measuring process: Python packages, and what a C++ compiler needs."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Sequence
from importlib import util
from pathlib import Path


def environment(path: Sequence[str], scratch: Path) -> dict[str, str]:
    """This process's environment, plus the Python path and the libraries that inductor links to."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if (driver := _driver_library()) is not None:
        # Often only libcuda.so.1 exists, but the linker looks for libcuda.so.
        links = scratch / "lib"
        links.mkdir(exist_ok=True)
        (links / "libcuda.so").unlink(missing_ok=True)
        (links / "libcuda.so").symlink_to(driver)
        others = os.environ.get("LIBRARY_PATH")
        found["LIBRARY_PATH"] = os.pathsep.join([str(links), *([others] if others else [])])
    if (toolkit := _cuda_headers()) is not None:
        found["CUDA_HOME"] = str(toolkit)
    return found


def _driver_library() -> Path | None:
    """The file of libcuda that this process loads; None without a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    mapped = re.search(r"\S*/libcuda\.so\S*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return Path(mapped[0]) if mapped else None


def _cuda_headers() -> Path | None:
    """The CUDA headers that come with torch; None if torch finds others itself."""
    known = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    spec = util.find_spec("nvidia")
    if known or Path("/usr/local/cuda").exists() or spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for header in sorted(Path(folder).glob("cu*/include/cuda.h"), reverse=True):
            return header.parent.parent
    return None
