"""The library for HTTP/2 stands behind one module, so that a bad release can be replaced."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent
CLIENT = ROOT / "clients" / "convserve_client"


def test_one_module_of_the_client_imports_ngh2() -> None:
    importers = {
        path.relative_to(CLIENT).as_posix()
        for path in CLIENT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ngh2"
    }
    assert importers == {"loadgen/wire/connection.py"}


def test_client_and_server_pin_the_same_release_of_ngh2() -> None:
    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    (pinned,) = [one for one in server["dependencies"] if one.startswith("ngh2")]
    assert pinned.startswith("ngh2==")
    assert pinned in client["optional-dependencies"]["bench"]
