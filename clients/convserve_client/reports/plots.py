"""Plots of the HTML report, drawn by matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from convserve_client.loadgen.results.report import Report
from convserve_client.loadgen.results.samples import (
    NOT_SENT,
    OK,
    REFUSED,
    STATUS_NUMBER,
    Array,
)
from convserve_client.loadgen.results.summary import mean_batch_rows

COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#7b5ea7", "#b08900", "#3d405b", "#a44a6f", "#2a9d8f")
OUTCOMES = {
    "in time": "#588157",
    "late": "#e0a83e",
    "refused": "#8d99ae",
    "failed": "#c8553d",
    "not sent": "#3d405b",
}
MAX_BINS = 60  # of a timeline
MIN_BIN_S = 0.1
PERCENTILE_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)


def _axes(rows: int = 1, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # keep text as text
            "svg.hashsalt": "convserve",  # the same run gives the same file
            "font.family": "sans-serif",
            "font.sans-serif": ["system-ui", "DejaVu Sans", "sans-serif"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e3e6ea",
        }
    )
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns about system-ui
    return pyplot.subplots(
        rows, figsize=(10, height), layout="constrained", sharex=rows > 1, squeeze=False
    )


def plot_distribution(reports: Sequence[Report], names: Sequence[str]) -> Any:
    figure, ((axes,),) = _axes()
    most_samples = 1
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        latencies = np.sort(_latencies_ms(report))
        if not len(latencies):
            continue
        most_samples = max(most_samples, len(latencies))
        # Not one point per sample: only as many points as are visible.
        ranks = np.unique(
            (len(latencies) * (1 - np.logspace(0, -np.log10(len(latencies)), 400))).astype(int)
        ).clip(0, len(latencies) - 1)
        axes.step(
            1 / (1 - ranks / len(latencies)),
            latencies[ranks],
            where="post",
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    ticks = [share for share in PERCENTILE_TICKS if 1 / (1 - share) <= most_samples * 1.01]
    axes.set(xscale="log", yscale="log", xlabel="percentile", ylabel="latency, ms")
    axes.set_xticks([1 / (1 - share) for share in ticks])
    axes.set_xticklabels([f"{share:.10g}" for share in (100 * np.array(ticks)).round(6)])
    axes.minorticks_off()
    _plain_numbers(axes)
    if len(reports) > 1:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def plot_throughput(reports: Sequence[Report]) -> Any:
    figure, ((axes,),) = _axes(height=4.2)
    groups: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        if report.summary.latency:
            groups.setdefault((report.plan.target, report.loop), []).append(report)
    for number, ((target, loop), members) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        members = sorted(
            members, key=lambda report: report.plan.rate_hz or report.plan.concurrency or 0
        )
        for attribute, style in (("p50_s", "--"), ("p99_s", "-")):
            points = [
                (report.summary.calls_hz, getattr(report.summary.latency, attribute) * 1e3)
                for report in members
            ]
            name = f"{attribute.removesuffix('_s')}, {loop} loop, {target}"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
            for point, report in zip(points, members, strict=True):
                fill = colour if report.is_valid else "white"
                axes.plot(*point, "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.set(xlabel="answers per second", ylabel="latency, ms", yscale="log", xlim=(0, None))
    _plain_numbers(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def plot_timeline(report: Report) -> Any:
    figure, all_axes = _axes(3, height=7)
    outcomes, latency, batches = all_axes[:, 0]
    samples, plan = report.samples, report.plan
    bins = max(1, min(MAX_BINS, int(report.ended_s / MIN_BIN_S)))
    edges = np.linspace(0, max(report.ended_s, 1e-9), bins + 1)
    width_s = float(edges[1] - edges[0])
    middles = (edges[:-1] + edges[1:]) / 2
    counts = [
        np.histogram(samples["due_s"][chosen], edges)[0] / width_s
        for chosen in _outcomes(report).values()
    ]
    shown = [(n, c) for n, c in zip(OUTCOMES, counts, strict=True) if c.any()]
    if shown:
        outcomes.stackplot(
            middles,
            *[count for _, count in shown],
            labels=[name for name, _ in shown],
            colors=[OUTCOMES[name] for name, _ in shown],
            step="mid",
        )
        outcomes.legend(
            frameon=False, fontsize="small", ncols=5, loc="lower right", bbox_to_anchor=(1, 1)
        )
    good = samples[samples["status"] == STATUS_NUMBER[OK]]
    parts = [good[(good["due_s"] >= low) & (good["due_s"] < high)] for low, high in pairwise(edges)]
    for percent, style in ((50, "--"), (99, "-")):
        values = [_percentile_ms(part, percent) for part in parts]
        latency.plot(middles, values, style, color=COLOURS[0], label=f"p{percent}")
    latency.legend(frameon=False, fontsize="small", loc="upper right")
    rows = [mean_batch_rows(part) or np.nan for part in parts]
    batches.plot(middles, rows, color=COLOURS[1])
    if np.isnan(rows).all():
        batches.text(0.5, 0.5, "unknown", transform=batches.transAxes, ha="center", color="0.5")
    outcomes.set(ylabel="requests per second", ylim=(0, None))
    latency.set(ylabel="latency, ms", ylim=(0, None))
    batches.set(ylabel="batch rows", xlabel="seconds", ylim=(0, None), xlim=(0, report.ended_s))
    for axes in all_axes[:, 0]:
        axes.axvspan(0, plan.warmup_s, color="#8d99ae", alpha=0.15, linewidth=0)
    return figure


def _outcomes(report: Report) -> dict[str, Array]:
    """Masks of the samples with each outcome, in the order of OUTCOMES."""
    samples = report.samples
    status = samples["status"]
    good = status == STATUS_NUMBER[OK]
    limits = np.array(report.plan.deadlines_s)[samples["request_class"]]
    in_time = good & (samples["finished_s"] - samples["due_s"] <= limits)
    refused = np.isin(status, [STATUS_NUMBER[name] for name in REFUSED])
    not_sent = status == STATUS_NUMBER[NOT_SENT]
    return {
        "in time": in_time,
        "late": good & ~in_time,
        "refused": refused,
        "failed": ~(good | refused | not_sent),
        "not sent": not_sent,
    }


def _latencies_ms(report: Report) -> Array:
    samples = report.samples
    chosen = (samples["due_s"] >= report.plan.warmup_s) & (samples["status"] == STATUS_NUMBER[OK])
    return np.asarray((samples["finished_s"] - samples["due_s"])[chosen] * 1e3)


def _percentile_ms(part: Array, percent: int) -> float:
    if not len(part):
        return float("nan")
    return float(np.percentile(part["finished_s"] - part["due_s"], percent) * 1e3)


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
