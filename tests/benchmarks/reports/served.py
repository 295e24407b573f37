"""Section of cpu.md: served models compared with their bare engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.pairs import Pairs, middle_half
from tests.benchmarks.reports.markdown import measured_at, median_and_range, table, turns
from tests.benchmarks.reports.plots import BLUE, GREEN, RED, plot, save
from tests.benchmarks.serving import IMAGES_IN_FLIGHT
from tests.benchmarks.targets.bare_process import Setup
from tests.benchmarks.targets.served import CALLERS


def served_section(page: Path, served: Mapping[str, Any]) -> list[str]:
    """Lines of the section; writes its plot next to the page."""
    image = page.with_name(f"{page.stem}-served.svg")
    save(draw(served), image)
    return [
        "## Served, compared with the bare engine",
        "",
        "![throughput relative to the bare engine, and latency that serving adds to one request]"
        f"({image.name})",
        "",
        *_throughput_table(served),
        "",
        "Bare: the engine in a process of its own, all instances of one group busy, at the batch "
        f"size with the highest throughput. Served: {CALLERS} callers in another process send raw "
        "pixels in a closed loop. N is the engine's maximum batch size; with N images per request, "
        f"as few callers as keep {IMAGES_IN_FLIGHT} images in flight, but at least 4. Each side "
        f"has {turns(served)}. A ratio compares two adjacent turns; the table shows the median and "
        "the range of the ratios." + _note_on_weights(served),
        "",
        *_latency_table(served),
        "",
        "Latency of one image while nothing else runs. Served: a single caller that sends one "
        "request at a time. Bare: a batch of 1 on the fastest instance. Each value is the median "
        "of turns of a quarter of a second, bare and served in turn. Added is the median "
        "difference of adjacent turns, followed by the middle half of these differences.",
        "",
    ]


def _throughput_table(served: Mapping[str, Any]) -> list[str]:
    headings = (
        "model",
        "bare, images/s",
        "instances",
        "1 image per request, images/s",
        "of bare (range)",
        "N",
        "N images per request, images/s",
        "of bare (range)",
        "measured",
    )
    rows = []
    for model, one in served.items():
        single, batched = Pairs(**one["single_hz"]), Pairs(**one["batched_hz"])
        rows.append(
            [
                model,
                f"{median(single.bare):,.1f}",
                str(Setup(**one["best"])),
                f"{median(single.served):,.1f}",
                median_and_range(single.ratios(), ".1%"),
                str(one["batched_images"]),
                f"{median(batched.served):,.1f}",
                median_and_range(batched.ratios(), ".1%"),
                measured_at(one),
            ]
        )
    return table(headings, rows)


def _latency_table(served: Mapping[str, Any]) -> list[str]:
    headings = ("model", "bare, ms", "served, ms", "added, ms", "middle half", "pairs")
    rows = []
    for model, one in served.items():
        latency = Pairs(**one["lone_ms"])
        low, high = middle_half(latency.differences())
        rows.append(
            [
                model,
                f"{median(latency.bare):.2f}",
                f"{median(latency.served):.2f}",
                f"{median(latency.differences()):+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                str(len(latency.bare)),
            ]
        )
    return table(headings, rows)


def _note_on_weights(served: Mapping[str, Any]) -> str:
    untrained = [model for model, one in served.items() if not one["trained"]]
    if not untrained:
        return ""
    return (
        f" The weights of {', '.join(untrained)} are random, which does not change these results."
    )


def draw(served: Mapping[str, Any]) -> Any:
    models, positions = list(served), range(len(served))
    figure, (rates, added) = plot(8, 1.3 + 0.55 * len(models), 2, sharey=True, width_ratios=(5, 4))
    for name, key, offset, colour in (
        ("1 image per request", "single_hz", -0.18, BLUE),
        ("a full batch per request", "batched_hz", 0.18, GREEN),
    ):
        ratios = [[100 * ratio for ratio in Pairs(**one[key]).ratios()] for one in served.values()]
        rates.barh(
            [position + offset for position in positions],
            [median(values) for values in ratios],
            height=0.34,
            color=colour,
            label=name,
            xerr=_whiskers(ratios, [(min(values), max(values)) for values in ratios]),
            error_kw={"elinewidth": 1, "ecolor": "0.25", "capsize": 2},
        )
    rates.axvline(100, color="0.6", linewidth=1, linestyle="--")
    rates.set(
        xlabel="served throughput, % of bare (whiskers: range)",
        yticks=list(positions),
        yticklabels=models,
        xlim=(0, None),
    )
    rates.invert_yaxis()
    rates.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    differences = [Pairs(**one["lone_ms"]).differences() for one in served.values()]
    added.errorbar(
        [median(values) for values in differences],
        list(positions),
        xerr=_whiskers(differences, [middle_half(values) for values in differences]),
        fmt="o",
        color=RED,
        capsize=3,
    )
    added.set(xlabel="latency added to one request, ms (whiskers: middle half)", xlim=(0, None))
    if any(middle_half(values)[0] < 0 for values in differences):
        added.set_xlim(None, None)
        added.axvline(0, color="0.6", linewidth=1)
    for axes in (rates, added):
        axes.grid(axis="x")
    return figure


def _whiskers(
    values: Iterable[Sequence[float]], ends: Iterable[tuple[float, float]]
) -> list[list[float]]:
    """Lengths to the left and to the right of each median."""
    pairs = [
        (median(one) - low, high - median(one))
        for one, (low, high) in zip(values, ends, strict=True)
    ]
    return [[left for left, _ in pairs], [right for _, right in pairs]]
