"""Prints what pyproject.toml asks for, one requirement a line: the base and the extras named.

    python deploy/requirements.py cpu build

So an image's layer of dependencies stays as it is while only code changes.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Raises SystemExit, naming the extras there are, for one that is not."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise SystemExit(f"{pyproject} has no extra {extra!r}; it has {', '.join(optional)}")
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return sorted(set(wanted))


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    print("\n".join(requirements(root / "pyproject.toml", sys.argv[1:])))
