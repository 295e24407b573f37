"""Unpacks wheels from a folder, so that a run needs no installation."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

# The order in which to try versions of TensorRT-RTX. 1.6.1 runs on a GPU that it does not list;
# 1.7.1 may refuse such a GPU.
RTX_VERSIONS = ("1.6.1.120", "1.5.0.114", "1.7.1.116")


def unpack_wheels(wheels: Path, packages: Path) -> dict[str, Path]:
    """Unpacks the packages that are missing or older here into `packages`.

    Each version of TensorRT-RTX gets its own folder. Returns these folders by version, in the order
    to try them.
    """
    found: dict[str, Path] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_, python, abi, machine = wheel.stem.split("-")
        if not _is_compatible(python, abi, machine):
            continue
        if name.startswith("tensorrt_rtx"):
            folder = found[version] = packages.parent / f"tensorrt-rtx-{version}"
        elif _installed_version(name) >= _numbers(version):
            continue
        else:
            folder = packages
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return {
        version: found[version] for version in (*RTX_VERSIONS, *sorted(found)) if version in found
    }


def _is_compatible(python: str, abi: str, machine: str) -> bool:
    """Whether a wheel with these tags works with this Python on this machine."""
    ours = f"cp3{sys.version_info.minor}"
    stable = abi == "abi3" and python.startswith("cp3")
    here = machine == "any" or machine.endswith(platform.machine())
    return here and (stable or bool({"py3", ours} & set(python.split("."))))


def _installed_version(name: str) -> tuple[int, ...]:
    """Empty if the package is not installed."""
    try:
        return _numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))
