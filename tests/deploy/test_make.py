"""The Makefile and the CI script."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.deploy.files import ROOT


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_without_a_target_lists_every_command() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    listed = set(re.findall(r"^  make ([a-z-]+) ", make(), flags=re.MULTILINE))
    assert listed == set(phony[1].split())


def test_the_index_for_torch_is_passed_to_pip(tmp_path: Path) -> None:
    commands = make("-n", "test", f"VENV={tmp_path / 'venv'}", "TORCH_INDEX=https://torch.example")
    assert "--extra-index-url https://torch.example" in commands


def test_make_test_creates_its_environment_lints_checks_types_and_tests(tmp_path: Path) -> None:
    commands = make("-n", "test", f"VENV={tmp_path / 'venv'}")
    steps = ["-m venv", "build,dev", "-m ruff check", "-m ruff format", "-m mypy", "-m pytest"]
    positions = [commands.index(step) for step in steps]
    assert positions == sorted(positions)


def test_ci_runs_the_same_command_as_a_contributor() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")
