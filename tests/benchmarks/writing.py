"""What the pages in docs/benchmarks are made of: tables, plots, and where a figure was measured."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.process.cores import available_cores
from tests.benchmarks.bare import processor

ROOT = Path(__file__).resolve().parent.parent.parent
BLUE, RED, GREEN, GREY = "#1f6f8b", "#c8553d", "#588157", "#8d99ae"
STYLE: Any = {  # matplotlib types it by the name of every setting there is
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "convserve",  # the same figures, the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
}


def machine() -> dict[str, str]:
    """What figures depend on besides the code: those of two machines don't belong in one table."""
    return {
        "processor": f"{processor()}, {available_cores()} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("openvino", "grpcio", "protobuf", "numpy")
        ),
    }


def moment() -> dict[str, str]:
    """The day, in UTC, and the code that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit or "unknown"}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of Markdown; all columns but the first `left` are numbers."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * left + "---:|" * (len(headings) - left),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def plot(
    width: float, height: float, columns: int = 1, **options: Any
) -> tuple[Any, Sequence[Any]]:
    """A figure of so many inches, and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    """As SVG on white, as pages are read on black too; the same figure gives the same file."""
    from matplotlib import pyplot

    figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib ends lines of paths with a space.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
