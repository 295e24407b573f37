"""Results on a terminal: a table of one run, a line a run of several, ratios, live progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from convserve_client.loadgen.load import NOT_SENT
from convserve_client.loadgen.measure import Report, Show
from convserve_client.loadgen.objective import Objective
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols import PHASES
from convserve_client.loadgen.worker import Progress

LATENCIES = {
    "p50": "p50_s",
    "p90": "p90_s",
    "p95": "p95_s",
    "p99": "p99_s",
    "p99.9": "p999_s",
    "max": "max_s",
}
RECENT_S = 2.0  # the progress tells of


def load_of(plan: Plan) -> str:
    """The load in words."""
    if plan.concurrency is not None:
        return f"closed loop, {plan.concurrency} caller" + "s" * (plan.concurrency > 1)
    rate = "" if plan.rate_hz is None else f" {plan.rate_hz:g}/s"
    how = {"poisson": "Poisson", "bursts": f"bursts of {plan.burst},"}.get(
        plan.arrivals, plan.arrivals
    )
    return f"open loop, {how}{rate}, seed {plan.seed}"


def models_of(plan: Plan) -> str:
    return ", ".join(dict.fromkeys(kind.model for kind in plan.kinds))


def margin(report: Report, figure: str, form: str = ",.1f") -> str:
    """The margin of a figure of `Report.confidence`, with its sign; empty where there is none."""
    found = report.confidence[figure]
    return "" if found is None else f" ±{found.margin:{form}}"


def rows(report: Report) -> Iterator[tuple[str, str] | None]:
    """What the table of one run says; None is a line between its parts."""
    plan, summary = report.plan, report.summary
    for model, version, trained in sorted(report.server.answered_by, key=str):
        untrained = ", UNTRAINED" if trained is False else ""
        yield "answered by", f"{model} version {version}{untrained}"
    yield "measured", f"{summary.duration_s:.1f} s" + ", cut short" * report.interrupted
    yield "bytes a call", f"{report.request_bytes:,.0f}"
    if len(plan.kinds) == 1:
        (kind,) = plan.kinds
        yield "images a call", str(kind.images)
        yield "deadline", f"{kind.deadline_ms:g} ms"
    yield None
    if summary.total:
        yield from _outcomes(report)
    yield None
    yield "goodput", f"{summary.goodput_hz:,.1f}{margin(report, 'goodput_hz')} /s"
    yield "calls", f"{summary.calls_hz:,.1f}{margin(report, 'calls_hz')} /s"
    yield "images", f"{summary.images_hz:,.1f} /s"
    if summary.latency:
        for name, attribute in LATENCIES.items():
            sure = margin(report, f"{name}_ms", ",.2f") if name in ("p50", "p99") else ""
            yield f"latency {name}", f"{getattr(summary.latency, attribute) * 1e3:,.2f}{sure} ms"
    if summary.lag_p99_s is not None and plan.concurrency is None:
        yield "sent late by, p99", f"{summary.lag_p99_s * 1e3:,.2f} ms"
    yield None
    yield from _by_kind(report)
    yield from _server(report)
    if report.client_cpu_s_per_call is not None:
        busiest = f"  (busiest process {report.sender_share:.0%} of a core)"
        yield "client: CPU a call", f"{report.client_cpu_s_per_call * 1e6:,.0f} us{busiest}"


def _outcomes(report: Report) -> Iterator[tuple[str, str]]:
    summary = report.summary

    def share(count: int) -> str:
        return f"{count:,}  {count / summary.total:7.2%}"

    yield "in time", share(summary.in_time)
    yield "late", share(summary.late)
    yield "refused", share(summary.refused)
    yield "failed", share(summary.failed)
    for status, count in sorted(summary.counts.items(), key=lambda item: -item[1]):
        note = f" (over {report.plan.max_in_flight} in flight)" if status == NOT_SENT else ""
        yield f"  {status}{note}", share(count)
    hints = summary.hints
    if hints.refusals:
        yield "refusals with a hint", f"{hints.given:,}"
        if report.plan.obey_hints:
            yield "  obeyed", f"{hints.obeyed:,}, then in time {hints.answered:,}"


def _by_kind(report: Report) -> Iterator[tuple[str, str] | None]:
    if len(report.plan.kinds) == 1:
        return
    for kind, part in zip(report.plan.kinds, report.by_kind, strict=True):
        name = f"{kind.model}, {kind.images} im., p {kind.priority}, {kind.deadline_ms:g} ms"
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
        yield "server: rows a batch, mean", f"{report.summary.mean_rows:.2f}"
    elif metrics is not None and metrics.batch_rows.mean:
        yield "server: rows a batch, mean", f"{metrics.batch_rows.mean:.2f}"
    if report.server_cpu_s_per_call is not None:
        yield "server: CPU a call", f"{report.server_cpu_s_per_call * 1e6:,.0f} us"
    if report.metrics_missing:
        yield "server: metrics", f"not read: {report.metrics_missing}"


def print_run(report: Report, objectives: Sequence[Objective], console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    plan = report.plan
    title = f"{models_of(plan)} at {plan.target}: {load_of(plan)}"
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
    for wanted in objectives:
        value = wanted.shown(wanted.value(report.summary))
        verdict = "[green]met[/]" if wanted.met(report.summary) else "[bold red]MISSED[/]"
        console.print(f"{verdict}: {escape(wanted.text)}, it is {value}")


def print_runs(reports: Sequence[Report], console: Any) -> None:
    """A line for each."""
    from rich.table import Table

    plan = reports[0].plan
    table = Table(title=f"{models_of(plan)} at {plan.target}", title_justify="left")
    headings = ("load", "calls /s", "in time /s", "p50 ms", "p99 ms", "p99.9 ms", "in time")
    for number, heading in enumerate((*headings, "refused", "rows", "server us a call", "")):
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
            "" if report.valid else "[bold red]NOT VALID[/]",
        )
    console.print(table)
    for fault in dict.fromkeys(fault for report in reports for fault in report.faults):
        console.print(f"[bold red]NOT VALID[/]: {fault}")


RATIOS = ("calls_hz", "images_hz", "goodput_hz", "p50", "p99", "p99.9", "server_cpu_s_per_call")


def compared(report: Report, figure: str) -> float | None:
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
    """By figure: the medians of A and of B, and of the rounds' ratios B / A, with all of them."""
    found: dict[str, dict[str, float | list[float]]] = {}
    for figure in RATIOS:
        pairs = [(compared(a, figure), compared(b, figure)) for a, b in rounds]
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
    title = f"A {one.protocol}://{one.target}, B {other.protocol}://{other.target}: {load_of(one)}"
    table = Table(title=f"{title}, {len(rounds)} rounds", title_justify="left")
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


@contextmanager
def live(console: Any) -> Iterator[Live]:
    """Progress of one run after the other, on one line, for as long as it lasts."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    # Drawn by hand, when there is something new: the bar's own thread would take from what is
    # measured.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bar:
        yield Live(bar)


class Live:
    """What is going on."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("connecting", total=1.0)

    def of(self, plan: Plan, title: str = "") -> Show:
        """To be told of the progress of a run."""
        recent: deque[tuple[float, Progress]] = deque()

        def show(now_s: float, progress: Progress) -> None:
            recent.append((now_s, progress))
            while now_s - recent[0][0] > RECENT_S:
                recent.popleft()
            phase = "warm-up" if now_s < plan.warmup_s else "measuring"
            if now_s > plan.until_s:
                phase = "waiting for the last answers"
            self._bar.update(
                self._task,
                total=plan.until_s,
                completed=min(now_s, plan.until_s),
                description=f"{title}{phase}: {_latest(recent)}",
                refresh=True,
            )

        return show


def _latest(recent: Sequence[tuple[float, Progress]]) -> str:
    whole = Progress()
    for _, progress in recent:
        whole.add(progress)
    span_s = max(recent[-1][0] - recent[0][0], 0.25)
    latencies = sorted(whole.latencies_s)
    told = f"{whole.answered / span_s:,.0f} /s"
    if latencies:
        p50_s, p99_s = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
        told += f", p50 {p50_s * 1e3:.1f} ms, p99 {p99_s * 1e3:.1f} ms"
    if whole.refused or whole.failed:
        told += f", refused {whole.refused / span_s:,.0f} /s, failed {whole.failed / span_s:,.0f}"
    return f"{told}, {recent[-1][1].in_flight} in flight"
