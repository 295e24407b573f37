"""The command `convserve` runs the other commands and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_has_a_help_text(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_help_lists_every_subcommand(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in cli.COMMANDS)


def test_an_unknown_subcommand_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["sevre"]) == 2
    shown = capsys.readouterr().err
    assert "'sevre' is not a command" in shown
    assert "serve" in shown


@pytest.mark.parametrize(("name", "package"), [("bench", "convserve_client"), ("build", "torch")])
def test_a_missing_package_is_named_with_how_to_install_it(name: str, package: str) -> None:
    code = f"""
import sys
sys.modules["{package}"] = None
from server.cli import main
sys.exit(main(["{name}", "--help"]))
"""
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"convserve {name} needs {package}: pip install" in ended.stderr


def test_serving_does_not_import_torch() -> None:
    code = """
import sys
from server.cli import main
try:
    main(["serve", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
