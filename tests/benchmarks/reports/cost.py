"""Section of cpu.md: CPU time of a request in the server, by phase."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.cost.measurement import PROFILE_S
from tests.benchmarks.cost.phases import MEANING, OTHER, PHASES, UNSPLIT
from tests.benchmarks.cost.sampling import RATE_HZ
from tests.benchmarks.reports.markdown import measured_at, median_and_range, table, turns
from tests.benchmarks.reports.plots import BLUE, GREEN, GREY, RED, plot, save
from tests.benchmarks.targets.served import CALLERS

JPEG = "files of 500x375"  # images of clients/bench.py with --input jpeg
COLOURS = {
    "loop": "#3d405b",
    "transport": BLUE,
    "protobuf": "#7fb2c4",
    "call": "#b08900",
    "decode": GREEN,
    "queue": "#7b5ea7",
    "engine": RED,
    "encode": "#a44a6f",
    "metrics": "#2a9d8f",
    OTHER: GREY,
    UNSPLIT: GREY,
}


def cost_section(page: Path, cost: Mapping[str, Any]) -> list[str]:
    """Lines of the section; writes its plot next to the page."""
    image = page.with_name(f"{page.stem}-cost.svg")
    save(draw(cost), image)
    unsplit = {name: one["unsplit"] for name, one in cost.items() if one["unsplit"]}
    return [
        "## CPU time of a request in the server",
        "",
        "Microseconds of CPU time, user and system, per request of one image.",
        "",
        f"![CPU time of a request by phase]({image.name})",
        "",
        *_phase_table(cost),
        "",
        *(f"The phases of {name} were not measured: {why}.\n" for name, why in unsplit.items()),
        f"{CALLERS} callers in another process send requests in a closed loop. `raw` means pixels "
        f"of the model's size, `jpeg` means {JPEG}. The total is the CPU time of the server "
        "process and its children (`/proc/PID/stat`) divided by the number of answered requests. "
        f"No profiler runs during this measurement. There are {turns(cost)}. The total is split "
        "in two steps:",
        "",
        "1. By thread, from `/proc/PID/task/*/stat` during the same runs. Threads that Python did "
        "not start belong to the engine, threads named `decode` to the decoders, and the first "
        "thread is the event loop.",
        f"2. The event loop's time by stack samples of py-spy, {RATE_HZ} per second for "
        f"{PROFILE_S:.0f} s of another run with the same load. A sample belongs to the phase of "
        "the innermost function of the server "
        "([table of phases](../../tests/benchmarks/cost/phases.py)).",
        "",
        "py-spy samples running threads, but it sometimes takes a waiting thread for a running "
        "one. So `loop` may be too large, but hardly too small. The standard error of a fraction p "
        "of n samples is about sqrt(p(1-p)/n).",
        "",
    ]


def _phase_table(cost: Mapping[str, Any]) -> list[str]:
    columns = list(cost.values())
    rows = []
    for phase in (*PHASES, OTHER, UNSPLIT):
        us = [one["phases_us"].get(phase) for one in columns]
        if any(value is not None for value in us):
            cells = [
                "" if value is None else f"{value:,.1f} ({value / median(one['total_us']):.1%})"
                for value, one in zip(us, columns, strict=True)
            ]
            rows.append([phase, MEANING[phase], *cells])
    totals = [median_and_range(one["total_us"], ",.0f") for one in columns]
    rows += [
        ["**all**", "median of the turns (range)", *totals],
        ["requests/s", "", *(f"{median(one['calls_hz']):,.1f}" for one in columns)],
        ["rows per batch", "", *(f"{one['rows']:.1f}" for one in columns)],
        ["samples", "of the event loop's thread", *(f"{one['samples']:,}" for one in columns)],
        ["measured", "", *(measured_at(one) for one in columns)],
    ]
    return table(("phase", "work", *cost), rows, left=2)


def draw(cost: Mapping[str, Any]) -> Any:
    """Left: all phases as percentages, because the totals differ by a factor of 100.

    Right: microseconds without engine and decoding, which would hide the other phases.
    """
    from matplotlib.patches import Patch

    figure, (percentages, others) = plot(9, 1.5 + 0.5 * len(cost), 2, sharey=True)
    rests = [_without(one["phases_us"], "engine", "decode") for one in cost.values()]
    widest_us = max(sum(rest.values()) for rest in rests)
    for position, (one, rest) in enumerate(zip(cost.values(), rests, strict=True)):
        total_us = sum(one["phases_us"].values())
        _stack(percentages, position, one["phases_us"], 100 / total_us, legible_us=0.08 * total_us)
        _stack(others, position, rest, 1.0, legible_us=0.06 * widest_us)
    shown = [phase for phase in COLOURS if any(phase in one["phases_us"] for one in cost.values())]
    figure.legend(
        handles=[Patch(color=COLOURS[phase], label=phase) for phase in shown],
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
        fontsize="small",
        handlelength=1,
        columnspacing=1,
    )
    percentages.set(
        xlabel="CPU time of a request, % (numbers in the bars: microseconds)",
        yticks=range(len(cost)),
        yticklabels=list(cost),
        xlim=(0, 125),
        xticks=range(0, 101, 20),
    )
    others.set(xlabel="without engine and decoding, microseconds")
    others.margins(x=0.2)
    percentages.invert_yaxis()
    return figure


def _without(phases_us: Mapping[str, float], *names: str) -> dict[str, float]:
    return {phase: us for phase, us in phases_us.items() if phase not in names}


def _stack(
    axes: Any, position: int, phases_us: Mapping[str, float], scale: float, *, legible_us: float
) -> None:
    """One bar with a part per phase. Parts of at least `legible_us` show their number."""
    total_us, left_us = sum(phases_us.values()), 0.0
    for phase, us in phases_us.items():
        axes.barh(position, us * scale, left=left_us, height=0.62, color=COLOURS[phase])
        if us >= legible_us:
            axes.text(
                *(left_us + us * scale / 2, position, f"{us:,.0f}"),
                ha="center",
                va="center",
                color="white",
                fontsize="x-small",
            )
        left_us += us * scale
    axes.annotate(
        f"{total_us:,.0f} us",
        (left_us, position),
        (4, 0),
        textcoords="offset points",
        va="center",
    )
