"""A report as one page: tables and plots in it, so that it opens without a network."""

from __future__ import annotations

import io
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from convserve_client.loadgen.load import (
    NOT_SENT,
    NUMBER,
    OK,
    REFUSED,
    Array,
)
from convserve_client.loadgen.measure import Report
from convserve_client.loadgen.objective import Objective
from convserve_client.reports.tables import load_of, models_of, rows

COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#7b5ea7", "#b08900", "#3d405b", "#a44a6f", "#2a9d8f")
OUTCOMES = {
    "in time": "#588157",
    "late": "#e0a83e",
    "refused": "#8d99ae",
    "failed": "#c8553d",
    "not sent": "#3d405b",
}
BINS = 60  # of a timeline, at most
LEAST_BIN_S = 0.1
NINES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.about { color: #59636e; margin-top: 0; } code { background: #f1f3f5; padding: .1rem .3rem; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem;
  border-bottom: 1px solid #e3e6ea; text-align: right; } td:first-child, th:first-child {
  text-align: left; padding-left: 0; } tr.part td { border-bottom: 2px solid #c9ced6; }
.wrong { color: #b3261e; font-weight: 600; } .met { color: #2e7d32; font-weight: 600; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #59636e; }
"""


def html(reports: Sequence[Report], objectives: Sequence[Objective], command: Sequence[str]) -> str:
    """The page. Raises ImportError where there is no matplotlib."""
    first, several = reports[0].plan, len({report.plan.target for report in reports}) > 1
    names = [load_of(r.plan) + f" at {r.plan.target}" * several for r in reports]
    title = f"{models_of(first)} at {first.target}"
    if len(reports) == 1:
        title += f": {load_of(first)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load from '
        f"{escape(platform.machine())}, Python {platform.python_version()}<br>"
        f"<code>{escape(shlex.join(command))}</code></p>",
        *_verdicts(reports, names, objectives),
    ]
    if len(reports) > 1:
        body += [_overview(reports, names), _figure(_against_throughput(reports), THROUGHPUT)]
    body.append(_figure(_distribution(reports, names), DISTRIBUTION))
    for report, name in zip(reports, names, strict=True):
        if len(reports) > 1:
            body.append(f"<h2>{escape(name)}</h2>")
        body += [_table(report), _figure(_timeline(report), TIMELINE)]
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


THROUGHPUT = (
    "Latency against throughput: answers a second, and how long they took, for each load. "
    "Hollow points are runs that are not valid."
)
DISTRIBUTION = (
    "Distribution of latency by percentile (its CDF, turned), from when a request was due to its "
    "answer; successes only. The further to the right, the rarer."
)
TIMELINE = (
    "Over time, the warm-up shaded: what became of the requests due then, a second; latency of the "
    "answers; mean rows of the batches that carried them, where answers tell."
)


def _verdicts(
    reports: Sequence[Report], names: Sequence[str], objectives: Sequence[Objective]
) -> list[str]:
    found = []
    for report, name in zip(reports, names, strict=True):
        where = f"{name}: " if len(reports) > 1 else ""
        for fault in report.faults:
            found.append(f'<p class="wrong">{escape(where)}not valid: {escape(fault)}</p>')
        for wanted in objectives:
            met = wanted.met(report.summary)
            word = "met" if met else "missed"
            value = wanted.shown(wanted.value(report.summary))
            found.append(
                f'<p class="{"met" if met else "wrong"}">{escape(where)}{word}: '
                f"{escape(wanted.text)}, it is {escape(value)}</p>"
            )
    return found


def _overview(reports: Sequence[Report], names: Sequence[str]) -> str:
    headings = ("load", "calls /s", "in time /s", "p50 ms", "p99 ms", "p99.9 ms", "refused")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in headings) + "</tr>"]
    for report, name in zip(reports, names, strict=True):
        summary, latency = report.summary, report.summary.latency
        shown = (latency.p50_s, latency.p99_s, latency.p999_s) if latency else ()
        cells = [
            escape(name),
            f"{summary.calls_hz:,.1f}",
            f"{summary.goodput_hz:,.1f}",
            *([f"{seconds * 1e3:,.2f}" for seconds in shown] or ["none"] * 3),
            f"{summary.refused / max(summary.total, 1):.1%}",
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(lines) + "</table>"


def _table(report: Report) -> str:
    lines, closing = ["<table>"], False
    for row in [*rows(report)][::-1]:  # from the end: a line belongs to the row above it
        if row is None:
            closing = True
            continue
        part = ' class="part"' if closing else ""
        lines.insert(1, f"<tr{part}><td>{escape(row[0])}</td><td>{escape(row[1])}</td></tr>")
        closing = False
    return "\n".join([*lines, "</table>"])


def _figure(drawn: Any, caption: str) -> str:
    from matplotlib import pyplot

    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(drawn)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Names of a plot's parts are unique in its file, not in a page of several.
    prefix = f"p{abs(hash(svg)) % 10**8}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _axes(rows: int = 1, height: float = 3.6) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",  # letters stay letters
            "svg.hashsalt": "convserve",  # the same run, the same file
            "font.family": "sans-serif",
            "font.sans-serif": ["system-ui", "DejaVu Sans", "sans-serif"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e3e6ea",
        }
    )
    import logging

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of system-ui
    return pyplot.subplots(
        rows, figsize=(10, height), layout="constrained", sharex=rows > 1, squeeze=False
    )


def _distribution(reports: Sequence[Report], names: Sequence[str]) -> Any:
    figure, ((axes,),) = _axes()
    most = 1
    for number, (report, name) in enumerate(zip(reports, names, strict=True)):
        latencies = np.sort(_latencies_ms(report))
        if not len(latencies):
            continue
        most = max(most, len(latencies))
        # One point a step of the curve is too many: as many as can be told apart.
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
    ticks = [share for share in NINES if 1 / (1 - share) <= most * 1.01]
    axes.set(xscale="log", yscale="log", xlabel="percentile", ylabel="latency, ms")
    axes.set_xticks([1 / (1 - share) for share in ticks])
    axes.set_xticklabels([f"{share:.10g}" for share in (100 * np.array(ticks)).round(6)])
    axes.minorticks_off()
    _plain_numbers(axes)
    if len(reports) > 1:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def _against_throughput(reports: Sequence[Report]) -> Any:
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
                fill = colour if report.valid else "white"
                axes.plot(*point, "o", color=colour, markerfacecolor=fill, markersize=5)
    axes.set(xlabel="answers a second", ylabel="latency, ms", yscale="log", xlim=(0, None))
    _plain_numbers(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _timeline(report: Report) -> Any:
    figure, all_axes = _axes(3, height=7)
    outcomes, latency, batches = all_axes[:, 0]
    samples, plan = report.samples, report.plan
    bins = max(1, min(BINS, int(report.ended_s / LEAST_BIN_S)))
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
    good = samples[samples["status"] == NUMBER[OK]]
    parts = [good[(good["due_s"] >= low) & (good["due_s"] < high)] for low, high in pairwise(edges)]
    for share, style in ((50, "--"), (99, "-")):
        values = [_percentile_ms(part, share) for part in parts]
        latency.plot(middles, values, style, color=COLOURS[0], label=f"p{share}")
    latency.legend(frameon=False, fontsize="small", loc="upper right")
    rows = [_mean_rows(part) for part in parts]
    batches.plot(middles, rows, color=COLOURS[1])
    if np.isnan(rows).all():
        batches.text(0.5, 0.5, "not told", transform=batches.transAxes, ha="center", color="0.5")
    outcomes.set(ylabel="requests a second", ylim=(0, None))
    latency.set(ylabel="latency, ms", ylim=(0, None))
    batches.set(ylabel="rows a batch", xlabel="seconds", ylim=(0, None), xlim=(0, report.ended_s))
    for axes in all_axes[:, 0]:
        axes.axvspan(0, plan.warmup_s, color="#8d99ae", alpha=0.15, linewidth=0)
    return figure


def _outcomes(report: Report) -> dict[str, Array]:
    """Which samples ended how, in the order of OUTCOMES."""
    samples = report.samples
    status = samples["status"]
    good = status == NUMBER[OK]
    limits = np.array(report.plan.deadlines_s)[samples["kind"]]
    in_time = good & (samples["finished_s"] - samples["due_s"] <= limits)
    refused = np.isin(status, [NUMBER[name] for name in REFUSED])
    not_sent = status == NUMBER[NOT_SENT]
    return {
        "in time": in_time,
        "late": good & ~in_time,
        "refused": refused,
        "failed": ~(good | refused | not_sent),
        "not sent": not_sent,
    }


def _latencies_ms(report: Report) -> Array:
    samples = report.samples
    chosen = (samples["due_s"] >= report.plan.warmup_s) & (samples["status"] == NUMBER[OK])
    return np.asarray((samples["finished_s"] - samples["due_s"])[chosen] * 1e3)


def _percentile_ms(part: Array, share: int) -> float:
    if not len(part):
        return float("nan")
    return float(np.percentile(part["finished_s"] - part["due_s"], share) * 1e3)


def _mean_rows(part: Array) -> float:
    rows = part["rows"][part["rows"] > 0].astype(float)
    return len(rows) / float((1 / rows).sum()) if len(rows) else float("nan")


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
