"""Origin of the figures: machine, date and commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from server.process.cores import available_cores
from tests.benchmarks.targets.bare import processor

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def machine() -> dict[str, str]:
    """Hardware and library versions. Figures with different ones do not belong in one table."""
    return {
        "processor": f"{processor()}, {available_cores()} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("openvino", "grpcio", "protobuf", "numpy")
        ),
    }


def date_and_commit() -> dict[str, str]:
    """Today in UTC, and the commit of the code."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit or "unknown"}
