"""Which wheels are unpacked, and in which order TensorRT versions are tried."""

from __future__ import annotations

import platform
import sys
import zipfile
from pathlib import Path

from tests.gpu.wheels import RTX_VERSIONS, unpack_wheels


def test_wheels_are_unpacked_unless_installed_and_versions_are_ordered(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    ours = f"cp3{sys.version_info.minor}"
    names = ["numpy-1.0-py3-none-any", "grpcio-999.0-py3-none-any", "absent_thing-1.0-py3-none-any"]
    names += [f"stable_thing-1.0-cp39-abi3-manylinux_2_28_{platform.machine()}"]
    names += [f"compiled_thing-1.0-{ours}-{ours}-linux_{platform.machine()}"]
    names += ["other_python-1.0-cp32-cp32-any", f"other_machine-1.0-{ours}-{ours}-linux_abacus"]
    names += [
        f"tensorrt_rtx_cu13_libs-{version}-py2.py3-none-any"
        for version in ("9.9", *sorted(RTX_VERSIONS))
    ]
    for name in names:
        with zipfile.ZipFile(wheels / f"{name}.whl", "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}/__init__.py", "")
    packages = tmp_path / "out" / "packages"
    versions = unpack_wheels(wheels, packages)
    assert list(versions) == [*RTX_VERSIONS, "9.9"]
    assert {path.name for path in packages.iterdir()} == {
        *("absent_thing", "compiled_thing", "stable_thing"),
        "grpcio",  # older here than the wheel; the installed numpy is newer
    }
    assert all((folder / "tensorrt_rtx_cu13_libs").is_dir() for folder in versions.values())
