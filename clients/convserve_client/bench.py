"""Measures a server from outside: answers, latency, throughput and refusals.

    convserve-bench --model resnet50 --concurrency 16    closed loop with 16 callers
    convserve-bench --model resnet50 --rate-hz 200       open loop with Poisson arrivals
    convserve-bench --model resnet50 --sweep --report report.html
    convserve-bench --model resnet50 --find-max-rate --objective 'p99<15ms'
    convserve-bench --model resnet50 --compare 127.0.0.1:8001 oip://127.0.0.1:9001
    convserve-bench --model resnet50 --scenario Server --rate-hz 100

Every request counts once, with its final status; nothing is retried unless --obey-retry-after is
given. Latency counts from the time when a request was due until its answer arrives; only successes
have a latency. A run is marked as not valid if the load generator could not keep up. Exit status:
0, 1 if no request succeeded, 2 for wrong usage, 3 if an --objective is missed.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convserve_client.errors import ClassifierError
from convserve_client.loadgen.arguments import parse_options
from convserve_client.loadgen.event_loop import run_loop
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.options import Options
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import UnsupportedModel
from convserve_client.loadgen.results.objective import all_met, highest_rate
from convserve_client.loadgen.results.report import Report
from convserve_client.loadgen.worker_pool import WorkerDied

FIRST_RATE_FRACTION = 0.7  # of a closed loop's throughput: first rate of --find-max-rate
MIN_SWEEP_GAIN = 1.05  # a sweep ends when twice the callers gain less than this
MAX_SWEEP_CALLERS = 1024
SWEEP_FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95)  # of a sweep's best throughput
MAX_CONFIRMATIONS = 5
NO_SUCCESS, MISSED = 1, 3


class Session:
    """Runs measurements one after the other, shows their progress, and keeps their reports."""

    def __init__(self, options: Options, progress_line: Any, console: Any) -> None:
        self.options = options
        self.reports: list[Report] = []
        self._progress_line = progress_line
        self._console = console

    @property
    def interrupted(self) -> bool:
        return bool(self.reports) and self.reports[-1].interrupted

    async def run(self, plan: Plan, title: str = "") -> Report:
        report = await measure(plan, self._progress_line.show_for(plan, title))
        self.reports.append(report)
        return report

    def print(self, text: str) -> None:
        self._console.print(text, highlight=False)


async def run_each(session: Session) -> None:
    """One run for each given number of callers or each given rate."""
    options, plan = session.options, session.options.plan
    plans = [replace(plan, concurrency=callers) for callers in options.concurrencies]
    plans += [replace(plan, rate_hz=rate_hz) for rate_hz in options.rates_hz]
    for number, one in enumerate(plans or [plan], 1):
        title = f"{number} of {len(plans)}, " if len(plans) > 1 else ""
        if (await session.run(one, title)).interrupted:
            return


async def sweep(session: Session) -> None:
    """Doubles the callers until throughput stops growing, then tries rates up to the best."""
    plan, best_hz = session.options.plan, 0.0
    callers = 1
    while callers <= MAX_SWEEP_CALLERS:
        report = await session.run(replace(plan, concurrency=callers), f"{callers} callers, ")
        if report.interrupted:
            return
        if report.summary.calls_hz < best_hz * MIN_SWEEP_GAIN:
            break
        best_hz = max(best_hz, report.summary.calls_hz)
        callers *= 2
    if not best_hz:
        return
    for fraction in SWEEP_FRACTIONS:
        rate_hz = fraction * best_hz
        one = replace(plan, concurrency=None, rate_hz=rate_hz)
        if (await session.run(one, f"{rate_hz:,.1f} /s, ")).interrupted:
            return


async def find_max_rate(session: Session) -> float | None:
    """Highest rate that meets the objectives, confirmed by a second run with other arrivals.

    None if there is no such rate, or if the search was interrupted.
    """
    options = session.options
    start_hz = options.plan.rate_hz
    if start_hz is None:
        first = await session.run(options.plan, "closed loop, ")
        start_hz = FIRST_RATE_FRACTION * first.summary.calls_hz
        if not start_hz or first.interrupted:
            return None
    search = highest_rate(start_hz, tolerance=options.tolerance)
    rate_hz = next(search)
    best_hz: float | None = None
    while not session.interrupted:
        try:
            rate_hz = search.send(await _meets_objectives(session, rate_hz, options.plan.seed))
        except StopIteration as end:
            best_hz = end.value
            break
    # The arrivals of one seed may be favourable by chance.
    for number in range(MAX_CONFIRMATIONS):
        if best_hz is None or session.interrupted:
            return None
        if await _meets_objectives(session, best_hz, options.plan.seed + 1 + number):
            return best_hz
        best_hz /= 1 + options.tolerance * (number + 1)
    return None


async def _meets_objectives(session: Session, rate_hz: float, seed: int) -> bool:
    objectives = session.options.objectives
    plan = replace(session.options.plan, concurrency=None, rate_hz=rate_hz, seed=seed)
    report = await session.run(plan, f"{rate_hz:,.1f} /s, ")
    met = report.is_valid and all_met(objectives, report.summary)
    values = ", ".join(
        f"{objective.figure} {objective.format(objective.value(report.summary))}"
        for objective in objectives
    )
    verdict = "met" if met else "not met" if report.is_valid else "[bold red]NOT VALID[/]"
    session.print(f"  {rate_hz:10,.1f} /s: {verdict}; {values}")
    return met


async def compare(session: Session) -> list[tuple[Report, Report]]:
    """Measures both targets in turn; the order changes in each round."""
    assert session.options.compare is not None
    rounds: list[tuple[Report, Report]] = []
    for number in range(session.options.rounds):
        found: dict[int, Report] = {}
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            title = f"round {number + 1} of {session.options.rounds}, {'AB'[side]}, "
            found[side] = await session.run(session.options.compare[side], title)
            if session.interrupted:
                return rounds
        rounds.append((found[0], found[1]))
    return rounds


async def run(options: Options, console: Any) -> tuple[dict[str, Any], list[Report], int]:
    """Runs what the options say. Returns the result for --json, the reports, the exit status."""
    from convserve_client.reports import tables
    from convserve_client.reports.progress import progress_line

    with progress_line(console) as line:
        session = Session(options, line, console)
        if options.compare:
            rounds = await compare(session)
        elif options.find_max_rate:
            rate_hz = await find_max_rate(session)
        elif options.sweep:
            await sweep(session)
        else:
            await run_each(session)
    reports = session.reports
    status = 0 if any(report.summary.succeeded for report in reports) else NO_SUCCESS
    runs = [report.as_json() for report in reports]
    if options.compare:
        if rounds:
            tables.print_ratios(rounds, console)
        return {"ratios": tables.ratios(rounds), "runs": runs}, reports, status
    if options.find_max_rate:
        tables.print_max_rate(rate_hz, options.objectives, reports, console)
        texts = [objective.text for objective in options.objectives]
        result: dict[str, Any] = {"highest_rate_hz": rate_hz, "objectives": texts, "runs": runs}
        return result, reports, status or (0 if rate_hz else MISSED)
    if len(reports) == 1:
        tables.print_run(reports[0], options.objectives, console)
    else:
        tables.print_runs(reports, console)
    missed = options.objectives and not all(
        report.is_valid and all_met(options.objectives, report.summary) for report in reports
    )
    result = runs[0] if len(runs) == 1 else {"runs": runs}
    return result, reports, status or (MISSED if missed else 0)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__, argv)
    try:
        # Imported early, because an import during a run would block the event loop.
        from rich import progress  # noqa: F401
        from rich.console import Console
    except ImportError:
        return _fail("the tables need rich: pip install 'convserve-client[bench]'")
    # JSON or CSV on standard output must not be mixed with the tables.
    to_stderr = "-" in (options.json_path, options.csv_path)
    terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
    console = Console(stderr=to_stderr, width=None if terminal else 120)
    try:
        _check_outputs(options)
        if options.scenario:
            from convserve_client.loadgen import mlperf

            reports: list[Report] = []
            result, status = mlperf.run(options, console)
        else:
            result, reports, status = run_loop(run(options, console))
        command = sys.argv if argv is None else ["convserve-bench", *argv]
        write_outputs(options, result, reports, command)
    except (ClassifierError, UnsupportedModel, WorkerDied) as error:
        return _fail(str(error))
    except (OSError, ImportError) as error:
        return _fail(_with_option(error, options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("interrupted before anything was measured")
    return status


def _check_outputs(options: Options) -> None:
    """Raises ImportError or OSError, before measuring, if an output could not be written."""
    if options.report_path:
        import matplotlib  # noqa: F401
    if options.hdr_path:
        import hdrh.histogram  # noqa: F401
    for path in (options.json_path, options.csv_path, options.report_path, options.hdr_path):
        if path not in ("", "-") and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {Path(path).parent} does not exist")


def write_outputs(
    options: Options, result: dict[str, Any], reports: Sequence[Report], command: Sequence[str]
) -> None:
    """Writes the requested files. The HTML report shows the command. Raises OSError."""
    from convserve_client.reports import export, html_report

    if options.json_path:
        export.write(options.json_path, json.dumps(result, indent=2) + "\n")
    if options.csv_path:
        export.write(options.csv_path, export.csv_of(reports))
    if options.hdr_path:
        export.write(options.hdr_path, export.hdr_log(reports))
    if options.report_path and reports:
        html = html_report.html_of(reports, options.objectives, command)
        export.write(options.report_path, html)


def _with_option(error: Exception, options: Options) -> str:
    """The message, with the option that caused the error if it is known."""
    for module, option, extra in (
        ("matplotlib", "--report", "report"),
        ("hdrh", "--hdr", "hdr"),
        ("mlperf", "--scenario", "mlperf"),
    ):
        if isinstance(error, ImportError) and module in str(error):
            return f"{option} needs {module}: pip install 'convserve-client[{extra}]'"
    source = options.plan.input
    return f"--input {source}: {error}" if source != "raw" else str(error)


def _fail(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return NO_SUCCESS


if __name__ == "__main__":
    sys.exit(main())
