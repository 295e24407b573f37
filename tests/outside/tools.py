"""Programs that these tests need. Without them a test is skipped, except in CI, which has them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

GRPC_JS = Path(__file__).parent / "grpc_js"
TIMEOUT_S = 60.0


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [one for one in programs if shutil.which(one) is None]
    return pytest.mark.skipif(
        bool(missing) and not os.environ.get("CI"), reason=f"needs {', '.join(missing)}"
    )


needs_grpc_js = pytest.mark.skipif(
    not (GRPC_JS / "node_modules").exists() and not os.environ.get("CI"),
    reason="needs grpc-js: npm ci --ignore-scripts --prefix tests/outside/grpc_js",
)


def output(*command: str | Path, **environment: str) -> str:
    """What the program prints. It must succeed."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
