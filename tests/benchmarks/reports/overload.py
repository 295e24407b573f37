"""Pages of overload: goodput of both schedulers against the offered load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.reports.markdown import measured_at, table
from tests.benchmarks.reports.plots import BLUE, RED, plot, save

HEADINGS = (
    "load",
    "scheduler",
    "offered /s",
    "in time /s",
    "of capacity",
    "in time",
    "late",
    "refused",
    "p99 latency",
    "rows per batch",
    "sent late, p99",
)

EXPLANATION = (
    "`deadline` is the default scheduler. `fixed` is `--scheduler fixed --fixed-batch 8 "
    "--fixed-delay-ms 2`: a fixed batch size and delay, without deadlines. In time: answered "
    "within the deadline, which starts when the request is due. Late: answered after the deadline, "
    "or not answered until then. Refused: RESOURCE_EXHAUSTED. The latency is that of all answers. "
    "Capacity: requests/s of 16 callers in a closed loop, measured in each round."
)


def title(results: Mapping[str, Any]) -> str:
    return (
        f"{results['model']}, deadlines of {results['deadline_ms']:g} ms, "
        f"capacity {results['capacity_hz']:,.0f} requests/s"
    )


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a table with `HEADINGS`."""
    return [
        [
            f"{one['load']:.1f} x",
            one["scheduler"],
            f"{one['offered_hz']:,.0f}",
            f"{one['goodput_hz']:,.1f}",
            f"{one['of_capacity']:.1%}",
            f"{one['in_time']:.1%}",
            f"{one['late']:.2%}",
            f"{one['refused']:.1%}",
            "none" if one["p99_ms"] is None else f"{one['p99_ms']:.1f} ms",
            f"{one['rows']:.1f}",
            f"{one['lag_ms']:.1f} ms",
        ]
        for one in results["figures"]
    ]


def overload_section(stem: str, results: Mapping[str, Any]) -> list[str]:
    """Lines of a section of cpu.md, which uses the plot of the page STEM.md."""
    return [
        f"## Overload: {title(results)}",
        "",
        f"![goodput against offered load, by scheduler]({stem}.svg)",
        "",
        *table(HEADINGS, rows(results), left=2),
        "",
        EXPLANATION,
        "",
        f"Measured {measured_at(results)}; {results['processor']}; {results['system']}, "
        f"{results['versions']}. {_rounds(results)} [How to measure it again]({stem}.md).",
        "",
    ]


def write_page(stem: Path, results: Mapping[str, Any]) -> None:
    """Writes STEM.md and STEM.svg from the contents of STEM.json."""
    factors = ",".join(dict.fromkeys(f"{one['load']:g}" for one in results["figures"]))
    lines = [
        f"# Overload: {title(results)}",
        "",
        f"{results['date']}, convserve at {results['commit']}; {results['processor']}, shared by "
        f"server and client; {results['system']}, {results['versions']}. {_rounds(results)}",
        "",
        f"    python -m tests.benchmarks.overload --repo REPO --model {results['model']} "
        f"--deadline-ms {results['deadline_ms']:g} --rounds {results['rounds']} "
        f"--seconds {results['seconds']:g} --factors {factors} --out {stem}",
        "",
        f"![goodput against offered load]({stem.name}.svg)",
        "",
        *table(HEADINGS, rows(results), left=2),
        "",
        EXPLANATION,
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines))
    save(draw(results), stem.with_suffix(".svg"))


def _rounds(results: Mapping[str, Any]) -> str:
    return (
        f"Medians of {results['rounds']} rounds, with {results['seconds']:g} s for each load and "
        "scheduler."
    )


def draw(results: Mapping[str, Any]) -> Any:
    figure, (axes,) = plot(7, 4.2)
    capacity_hz = results["capacity_hz"]
    axes.axhline(capacity_hz, color="0.6", linewidth=1, linestyle="--")
    axes.annotate("capacity", (0, capacity_hz), (3, 3), textcoords="offset points", color="0.4")
    # Each curve has its name at its end, on the side away from the other curve.
    for scheduler, colour, above in (("deadline", BLUE, -16), ("fixed", RED, 8)):
        points = [one for one in results["figures"] if one["scheduler"] == scheduler]
        offered = [point["offered_hz"] for point in points]
        goodput = [point["goodput_hz"] for point in points]
        axes.plot(offered, goodput, marker="o", color=colour)
        axes.annotate(
            f"--scheduler {scheduler}",
            (offered[-1], goodput[-1]),
            (0, above),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(
        xlabel="offered requests/s",
        ylabel=f"requests/s answered within {results['deadline_ms']:g} ms",
        title=title(results),
        xlim=(0, None),
        ylim=(0, 1.15 * max(capacity_hz, *(one["goodput_hz"] for one in results["figures"]))),
    )
    return figure
