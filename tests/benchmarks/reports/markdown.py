"""Markdown of the pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table. All columns but the first `left` are aligned as numbers."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * left + "---:|" * (len(headings) - left),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def median_and_range(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def turns(entries: Mapping[str, Any]) -> str:
    """Number and length of the turns, once if all entries have the same."""
    lengths = {
        f"{len(one.get('calls_hz') or one['single_hz']['bare'])} turns of {one['seconds']:g} s"
        for one in entries.values()
    }
    return " or ".join(sorted(lengths))


def measured_at(one: Mapping[str, Any]) -> str:
    return f"{one['date']}, {one['commit']}"
