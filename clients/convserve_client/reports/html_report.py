"""Report as one HTML page with tables and plots inside, so that it opens without a network."""

from __future__ import annotations

import io
import platform
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from convserve_client.loadgen.results.objective import Objective
from convserve_client.loadgen.results.report import Report
from convserve_client.reports.plots import plot_distribution, plot_throughput, plot_timeline
from convserve_client.reports.tables import describe_load, rows

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


def html_of(
    reports: Sequence[Report], objectives: Sequence[Objective], command: Sequence[str]
) -> str:
    """Raises ImportError if matplotlib is not installed."""
    first, several = reports[0].plan, len({report.plan.target for report in reports}) > 1
    names = [describe_load(r.plan) + f" at {r.plan.target}" * several for r in reports]
    title = f"{', '.join(first.models)} at {first.target}"
    if len(reports) == 1:
        title += f": {describe_load(first)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load from '
        f"{escape(platform.machine())}, Python {platform.python_version()}<br>"
        f"<code>{escape(shlex.join(command))}</code></p>",
        *_verdicts(reports, names, objectives),
    ]
    if len(reports) > 1:
        body += [_overview(reports, names), _figure(plot_throughput(reports), THROUGHPUT)]
    body.append(_figure(plot_distribution(reports, names), DISTRIBUTION))
    for report, name in zip(reports, names, strict=True):
        if len(reports) > 1:
            body.append(f"<h2>{escape(name)}</h2>")
        body += [_table(report), _figure(plot_timeline(report), TIMELINE)]
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


THROUGHPUT = (
    "Latency and throughput (answers per second) of each load. Hollow points are runs that are not"
    " valid."
)
DISTRIBUTION = (
    "Latency by percentile, from the due time of a request to its answer; successes only. Values"
    " further to the right are rarer."
)
TIMELINE = (
    "Over time; the warm-up is shaded. Top: outcomes of the requests due at that time, per second."
    " Middle: latency of the answers. Bottom: mean rows of their batches, if the answers say."
)


def _verdicts(
    reports: Sequence[Report], names: Sequence[str], objectives: Sequence[Objective]
) -> list[str]:
    found = []
    for report, name in zip(reports, names, strict=True):
        where = f"{name}: " if len(reports) > 1 else ""
        for fault in report.faults:
            found.append(f'<p class="wrong">{escape(where)}not valid: {escape(fault)}</p>')
        for objective in objectives:
            met = objective.is_met(report.summary)
            word = "met" if met else "missed"
            value = objective.format(objective.value(report.summary))
            found.append(
                f'<p class="{"met" if met else "wrong"}">{escape(where)}{word}: '
                f"{escape(objective.text)}, measured {escape(value)}</p>"
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
    for row in [*rows(report)][::-1]:  # from the end, because a separator styles the row above it
        if row is None:
            closing = True
            continue
        part = ' class="part"' if closing else ""
        lines.insert(1, f"<tr{part}><td>{escape(row[0])}</td><td>{escape(row[1])}</td></tr>")
        closing = False
    return "\n".join([*lines, "</table>"])


def _figure(plot: Any, caption: str) -> str:
    from matplotlib import pyplot

    file = io.StringIO()
    plot.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(plot)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # IDs are unique within one plot; the prefix makes them unique in the page.
    prefix = f"p{abs(hash(svg)) % 10**8}-"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
