"""Options and preparations that several commands share."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from convserve_client.loadgen.argument_types import at_least, positive
from server.repository.contents import list_versions

ROOT = Path(__file__).resolve().parent.parent.parent


def command_parser(
    description: str | None, *, rounds: int, seconds: float
) -> argparse.ArgumentParser:
    """Options for the model, the number of rounds and the length of each turn."""
    parser = plain_parser(description)
    add = parser.add_argument
    add("--repo", type=Path, required=True, help="model repository; missing models are built")
    add("--model", default="resnet50", help="model to measure (%(default)s)")
    add_turns(parser, rounds=rounds, seconds=seconds)
    return parser


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_turns(parser: argparse.ArgumentParser, *, rounds: int, seconds: float) -> None:
    add = parser.add_argument
    add("--rounds", type=at_least(1), default=rounds, help="turns of each side (%(default)s)")
    add("--seconds", type=positive, default=seconds, help="length of a turn (%(default)g)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results to this file"
    )


def console(width: int = 100) -> Console:
    """Standard output: as wide as the terminal, or `width` if it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def build_if_missing(repo: Path, model: str, console: Console) -> None:
    if repo.is_dir() and any(
        version.model == model and version.manifest for version in list_versions(repo)
    ):
        return
    console.print(f"building {model}, with random weights if there are no others")
    build = [sys.executable, "-m", "model_repo.build", model, "--repo", str(repo), "--or-random"]
    status = subprocess.run(build, cwd=ROOT).returncode
    if status:
        raise SystemExit(f"bench: the build failed with status {status}")
