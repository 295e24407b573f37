"""Results as tables on a terminal: one run, several runs, or ratios between two targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import PHASES
from convserve_client.loadgen.results.objective import Objective
from convserve_client.loadgen.results.report import Report
from convserve_client.loadgen.results.samples import NOT_SENT

LATENCIES = {
    "p50": "p50_s",
    "p90": "p90_s",
    "p95": "p95_s",
    "p99": "p99_s",
    "p99.9": "p999_s",
    "max": "max_s",
}


def describe_load(plan: Plan) -> str:
    if plan.concurrency is not None:
        return f"closed loop, {plan.concurrency} caller" + "s" * (plan.concurrency > 1)
    rate = "" if plan.rate_hz is None else f" {plan.rate_hz:g}/s"
    how = {"poisson": "Poisson", "bursts": f"bursts of {plan.burst},"}.get(
        plan.arrivals, plan.arrivals
    )
    return f"open loop, {how}{rate}, seed {plan.seed}"


def margin(report: Report, figure: str, form: str = ",.1f") -> str:
    """Margin of a figure of `Report.confidence`, for example " ±3.0"; empty if unknown."""
    found = report.confidence[figure]
    return "" if found is None else f" ±{found.margin:{form}}"


def rows(report: Report) -> Iterator[tuple[str, str] | None]:
    """Rows of the table of one run; None is a line between two parts."""
    plan, summary = report.plan, report.summary
    for model, version, trained in sorted(report.server.answered_by, key=str):
        untrained = ", UNTRAINED" if trained is False else ""
        yield "answered by", f"{model} version {version}{untrained}"
    yield "measured", f"{summary.duration_s:.1f} s" + ", interrupted" * report.interrupted
    yield "bytes per call", f"{report.request_bytes:,.0f}"
    yield "connections", str(report.connections)
    if len(plan.classes) == 1:
        (only,) = plan.classes
        yield "images per call", str(only.images)
        yield "deadline", f"{only.deadline_ms:g} ms"
    yield None
    if summary.total:
        yield from _outcomes(report)
    yield None
    yield "goodput", f"{summary.goodput_hz:,.1f}{margin(report, 'goodput_hz')} /s"
    yield "calls", f"{summary.calls_hz:,.1f}{margin(report, 'calls_hz')} /s"
    yield "images", f"{summary.images_hz:,.1f} /s"
    if summary.latency:
        for name, attribute in LATENCIES.items():
            plus_minus = margin(report, f"{name}_ms", ",.2f") if name in ("p50", "p99") else ""
            latency_ms = getattr(summary.latency, attribute) * 1e3
            yield f"latency {name}", f"{latency_ms:,.2f}{plus_minus} ms"
    if summary.lag_p99_s is not None and plan.concurrency is None:
        yield "sent late, p99", f"{summary.lag_p99_s * 1e3:,.2f} ms"
    yield None
    yield from _by_class(report)
    yield from _server(report)
    if report.client_cpu_s_per_call is not None:
        busiest = f"  (busiest process {report.busiest_worker:.0%} of a core)"
        yield "client: CPU per call", f"{report.client_cpu_s_per_call * 1e6:,.0f} us{busiest}"


def _outcomes(report: Report) -> Iterator[tuple[str, str]]:
    summary = report.summary

    def with_percentage(count: int) -> str:
        return f"{count:,}  {count / summary.total:7.2%}"

    yield "in time", with_percentage(summary.in_time)
    yield "late", with_percentage(summary.late)
    yield "refused", with_percentage(summary.refused)
    yield "failed", with_percentage(summary.failed)
    for status, count in sorted(summary.counts.items(), key=lambda item: -item[1]):
        note = f" (over {report.plan.max_in_flight} in flight)" if status == NOT_SENT else ""
        yield f"  {status}{note}", with_percentage(count)
    retry_after = summary.retry_after
    if retry_after.refusals:
        yield "refusals that say when to retry", f"{retry_after.given:,}"
        if report.plan.obey_retry_after:
            yield "  retried", f"{retry_after.obeyed:,}, then in time {retry_after.answered:,}"


def _by_class(report: Report) -> Iterator[tuple[str, str] | None]:
    if len(report.plan.classes) == 1:
        return
    for one, part in zip(report.plan.classes, report.by_class, strict=True):
        name = f"{one.model}, {one.images} img, prio {one.priority}, {one.deadline_ms:g} ms"
        p99 = f", p99 {part.latency.p99_s * 1e3:,.2f} ms" if part.latency else ""
        in_time = f"{part.in_time / part.total:.1%} in time" if part.total else "none due"
        yield name, f"{part.goodput_hz:,.1f} /s, {in_time}{p99}"
    yield None


def _server(report: Report) -> Iterator[tuple[str, str]]:
    server, metrics = report.server, report.metrics
    if metrics is not None:
        for phase, histogram in metrics.phases.items():
            if histogram.mean is not None:
                p99_s = histogram.quantile(0.99) or 0.0
                yield (
                    f"server: {phase}",
                    f"mean {histogram.mean * 1e3:,.2f}, p99 {p99_s * 1e3:,.2f} ms",
                )
    elif server.answers:
        for phase, spent_ms in zip(PHASES, server.phases_ms, strict=True):
            yield f"server: {phase}, mean", f"{spent_ms / server.answers:,.2f} ms"
    if report.summary.mean_rows:
        yield "server: mean batch rows", f"{report.summary.mean_rows:.2f}"
    elif metrics is not None and metrics.batch_rows.mean:
        yield "server: mean batch rows", f"{metrics.batch_rows.mean:.2f}"
    if report.server_cpu_s_per_call is not None:
        yield "server: CPU per call", f"{report.server_cpu_s_per_call * 1e6:,.0f} us"
    if report.metrics_missing:
        yield "server: metrics", f"not read: {report.metrics_missing}"


def print_run(report: Report, objectives: Sequence[Objective], console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    plan = report.plan
    title = f"{', '.join(plan.models)} at {plan.target}: {describe_load(plan)}"
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows(report):
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(escape, row))
    console.print(table)
    _print_verdict(report, objectives, console)


def _print_verdict(report: Report, objectives: Sequence[Objective], console: Any) -> None:
    from rich.markup import escape

    for fault in report.faults:
        console.print(f"[bold red]NOT VALID[/]: {escape(fault)}")
    for objective in objectives:
        value = objective.format(objective.value(report.summary))
        verdict = "[green]met[/]" if objective.is_met(report.summary) else "[bold red]MISSED[/]"
        console.print(f"{verdict}: {escape(objective.text)}, measured {value}")


def print_runs(reports: Sequence[Report], console: Any) -> None:
    """One line for each run."""
    from rich.table import Table

    plan = reports[0].plan
    table = Table(title=f"{', '.join(plan.models)} at {plan.target}", title_justify="left")
    headings = ("load", "calls /s", "in time /s", "p50 ms", "p99 ms", "p99.9 ms", "in time")
    for number, heading in enumerate((*headings, "refused", "rows", "server us/call", "")):
        table.add_column(heading, justify="right" if number else "left")
    for report in reports:
        summary, latency = report.summary, report.summary.latency
        cpu_s = report.server_cpu_s_per_call
        total = max(summary.total, 1)
        table.add_row(
            f"{report.plan.concurrency} callers"
            if report.plan.concurrency is not None
            else f"{report.plan.rate_hz or 0:,.1f} /s",
            f"{summary.calls_hz:,.1f}",
            f"{summary.goodput_hz:,.1f}",
            *(
                f"{getattr(latency, LATENCIES[name]) * 1e3:,.2f}" if latency else "-"
                for name in ("p50", "p99", "p99.9")
            ),
            f"{summary.in_time / total:.1%}",
            f"{summary.refused / total:.1%}",
            f"{summary.mean_rows:.1f}" if summary.mean_rows else "-",
            "-" if cpu_s is None else f"{cpu_s * 1e6:,.0f}",
            "" if report.is_valid else "[bold red]NOT VALID[/]",
        )
    console.print(table)
    for fault in dict.fromkeys(fault for report in reports for fault in report.faults):
        console.print(f"[bold red]NOT VALID[/]: {fault}")


RATIOS = ("calls_hz", "images_hz", "goodput_hz", "p50", "p99", "p99.9", "server_cpu_s_per_call")


def _compared_value(report: Report, figure: str) -> float | None:
    if figure in LATENCIES:
        latency = report.summary.latency
        return getattr(latency, LATENCIES[figure]) * 1e3 if latency else None
    if figure == "server_cpu_s_per_call":
        cpu_s = report.server_cpu_s_per_call
        return None if cpu_s is None else cpu_s * 1e6
    return float(getattr(report.summary, figure))


def ratios(
    rounds: Sequence[tuple[Report, Report]],
) -> dict[str, dict[str, float | list[float]]]:
    """For each figure: medians of A, of B and of the ratios B / A, and the ratio of each round."""
    found: dict[str, dict[str, float | list[float]]] = {}
    for figure in RATIOS:
        pairs = [(_compared_value(a, figure), _compared_value(b, figure)) for a, b in rounds]
        both = [(a, b) for a, b in pairs if a and b]
        if both:
            each = [b / a for a, b in both]
            found[figure] = {
                "a": median(a for a, _ in both),
                "b": median(b for _, b in both),
                "ratio": median(each),
                "rounds": each,
            }
    return found


def print_ratios(rounds: Sequence[tuple[Report, Report]], console: Any) -> None:
    from rich.table import Table

    one, other = rounds[0][0].plan, rounds[0][1].plan
    targets = f"A {one.protocol}://{one.target}, B {other.protocol}://{other.target}"
    title = f"{targets}: {describe_load(one)}, {len(rounds)} rounds"
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(("median", "A", "B", "B / A", "rounds")):
        table.add_column(heading, justify="right" if number else "left")
    for figure, found in ratios(rounds).items():
        each = found["rounds"]
        assert isinstance(each, list)
        unit = " ms" if figure in LATENCIES else " us" if "cpu" in figure else " /s"
        table.add_row(
            figure,
            f"{found['a']:,.2f}{unit}",
            f"{found['b']:,.2f}{unit}",
            f"{found['ratio']:.3f}",
            f"{min(each):.3f} to {max(each):.3f}",
        )
    console.print(table)
    faults = (fault for pair in rounds for report in pair for fault in report.faults)
    for fault in dict.fromkeys(faults):
        console.print(f"[bold red]NOT VALID[/]: {fault}")


def print_max_rate(
    rate_hz: float | None,
    objectives: Sequence[Objective],
    reports: Sequence[Report],
    console: Any,
) -> None:
    if any(not report.is_valid for report in reports):
        console.print("Some runs were not valid: the generator was the limit.")
    texts = ", ".join(objective.text for objective in objectives)
    found = f"{rate_hz:,.1f} /s" if rate_hz else "none found"
    console.print(f"highest rate with {texts}: {found}", highlight=False)
