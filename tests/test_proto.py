"""The contract's stubs are those of the contract, and every field of it is explained."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = sorted((ROOT / "proto").glob("*.proto"))


def test_the_committed_stubs_are_what_make_proto_writes(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs]
    environment = {"PATH": str(Path(sys.executable).parent)}  # where the plugin for mypy lies
    sources = [str(path.relative_to(ROOT)) for path in CONTRACTS]
    subprocess.run([*command, *sources], cwd=ROOT, env=environment, check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "proto").iterdir()}
    assert len(made) >= 3 * len(CONTRACTS)
    for name, text in made.items():
        assert (ROOT / "proto" / name).read_text() == text, f"{name}: run make proto"


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda path: path.name)
def test_every_rpc_field_and_value_has_a_comment(contract: Path) -> None:
    lines = [line.strip() for line in contract.read_text().splitlines()]
    declared = re.compile(r"(repeated )?[\w.]+ \w+ = \d+;|rpc \w+\(")
    count = 0
    for before, line in zip(lines, lines[1:], strict=False):
        if declared.match(line) and not line.startswith(("syntax", "option")):
            count += 1
            assert before.startswith("//"), f"{line} has no comment"
    assert count > 20
