"""Plots of the pages, as SVG. The same figures give the same file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLUE, RED, GREEN, GREY = "#1f6f8b", "#c8553d", "#588157", "#8d99ae"
STYLE: Any = {  # Any: matplotlib's type lists the name of every setting
    "svg.fonttype": "none",  # keeps text as text
    "svg.hashsalt": "convserve",  # makes the ids in the file reproducible
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


def plot(
    width: float, height: float, columns: int = 1, **options: Any
) -> tuple[Any, Sequence[Any]]:
    """A figure of this size in inches, with its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    """Writes SVG on white, because pages may have a dark background."""
    from matplotlib import pyplot

    figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib ends the lines of paths with a space.
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
