"""Command: measures a server from outside: what it answers, how fast, and what it refuses.

    python clients/bench.py --model resnet50 --concurrency 16   callers who ask, wait, ask again
    python clients/bench.py --model resnet50 --rate 200         Poisson arrivals, waiting for nobody
    python clients/bench.py --model resnet50 --sweep --report report.html
    python clients/bench.py --model resnet50 --find-max-rate --objective 'p99<15ms'
    python clients/bench.py --model resnet50 --compare 127.0.0.1:8001 oip://127.0.0.1:9001
    python clients/bench.py --model resnet50 --scenario Server --rate 100

Nothing is retried unless asked for: every request counts once, under the status it ended with.
Latency runs from the moment a request was due to the moment its answer was there; only successes
have one. A run whose generator could not keep up is marked as not valid. Exit status: 0, 1 when
nothing succeeded, 2 for wrong usage, 3 when an --objective is missed or met by no valid run.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convserve_client.errors import ClassifierError
from convserve_client.loadgen.arguments import Asked, parsed
from convserve_client.loadgen.event_loop import run_loop
from convserve_client.loadgen.measure import Report, measure
from convserve_client.loadgen.objective import all_met, highest_rate
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols import Unaskable
from convserve_client.loadgen.worker_pool import SenderDied

START_SHARE = 0.7  # of what a closed loop gets: where the search for the highest rate begins
SWEEP_GAIN = 1.05  # more callers that bring no more than this are the last
SWEEP_MOST = 1024  # callers
SWEEP_SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95)  # of a sweep's best, as rates of the open loop
CONFIRM_TRIES = 5
NOTHING, MISSED = 1, 3


class Session:
    """Runs one after the other, with their progress shown; keeps what each found."""

    def __init__(self, asked: Asked, live: Any, console: Any) -> None:
        self.asked = asked
        self.reports: list[Report] = []
        self._live = live
        self._console = console

    @property
    def interrupted(self) -> bool:
        return bool(self.reports) and self.reports[-1].interrupted

    async def run(self, plan: Plan, title: str = "") -> Report:
        report = await measure(plan, self._live.of(plan, title))
        self.reports.append(report)
        return report

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)


async def points(session: Session) -> None:
    """A run for each number of callers, or each rate, that was given."""
    asked, plan = session.asked, session.asked.plan
    plans = [replace(plan, concurrency=callers) for callers in asked.concurrencies]
    plans += [replace(plan, rate_hz=rate_hz) for rate_hz in asked.rates_hz]
    for number, one in enumerate(plans or [plan], 1):
        title = f"{number} of {len(plans)}, " if len(plans) > 1 else ""
        if (await session.run(one, title)).interrupted:
            return


async def sweep(session: Session) -> None:
    """Ever more callers until no more comes of them, then rates up to what they got."""
    plan, best_hz = session.asked.plan, 0.0
    callers = 1
    while callers <= SWEEP_MOST:
        report = await session.run(replace(plan, concurrency=callers), f"{callers} callers, ")
        if report.interrupted:
            return
        if report.summary.calls_hz < best_hz * SWEEP_GAIN:
            break
        best_hz = max(best_hz, report.summary.calls_hz)
        callers *= 2
    if not best_hz:
        return
    for share in SWEEP_SHARES:
        rate_hz = share * best_hz
        one = replace(plan, concurrency=None, rate_hz=rate_hz)
        if (await session.run(one, f"{rate_hz:,.1f} /s, ")).interrupted:
            return


async def find_max_rate(session: Session) -> float | None:
    """The highest rate that meets the objectives, met twice: once more with other arrivals.

    None where there is none, or an interrupt ended the search.
    """
    asked = session.asked
    open_loop = replace(asked.plan, concurrency=None)
    start_hz = asked.plan.rate_hz
    if start_hz is None:
        first = await session.run(asked.plan, "callers, ")
        start_hz = START_SHARE * first.summary.calls_hz
        if not start_hz or first.interrupted:
            return None

    async def met(rate_hz: float, seed: int) -> bool:
        plan = replace(open_loop, rate_hz=rate_hz, seed=seed)
        report = await session.run(plan, f"{rate_hz:,.1f} /s, ")
        found = report.valid and all_met(asked.objectives, report.summary)
        values = ", ".join(
            f"{wanted.figure} {wanted.shown(wanted.value(report.summary))}"
            for wanted in asked.objectives
        )
        verdict = "met" if found else "not met" if report.valid else "[bold red]NOT VALID[/]"
        session.say(f"  {rate_hz:10,.1f} /s: {verdict}; {values}")
        return found

    tries = highest_rate(start_hz, tolerance=asked.tolerance)
    rate_hz = next(tries)
    best_hz: float | None = None
    while not session.interrupted:
        try:
            rate_hz = tries.send(await met(rate_hz, asked.plan.seed))
        except StopIteration as end:
            best_hz = end.value
            break
    # The luck of one seed is no promise.
    for number in range(CONFIRM_TRIES):
        if best_hz is None or session.interrupted:
            return None
        if await met(best_hz, asked.plan.seed + 1 + number):
            return best_hz
        best_hz /= 1 + asked.tolerance * (number + 1)
    return None


async def compare(session: Session) -> list[tuple[Report, Report]]:
    """Both targets in turn, in another order each round."""
    assert session.asked.compare is not None
    rounds: list[tuple[Report, Report]] = []
    for number in range(session.asked.rounds):
        found: dict[int, Report] = {}
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            title = f"round {number + 1} of {session.asked.rounds}, {'AB'[side]}, "
            found[side] = await session.run(session.asked.compare[side], title)
            if session.interrupted:
                return rounds
        rounds.append((found[0], found[1]))
    return rounds


async def work(asked: Asked, console: Any) -> tuple[dict[str, Any], list[Report], int]:
    """Does what was asked for; gives the result for --json, the runs, and the exit status."""
    from convserve_client.reports import tables

    with tables.live(console) as live:
        session = Session(asked, live, console)
        if asked.compare:
            rounds = await compare(session)
        elif asked.find_max_rate:
            rate_hz = await find_max_rate(session)
        elif asked.sweep:
            await sweep(session)
        else:
            await points(session)
    reports = session.reports
    status = 0 if any(report.summary.succeeded for report in reports) else NOTHING
    runs = [report.as_json() for report in reports]
    if asked.compare:
        if rounds:
            tables.print_ratios(rounds, console)
        return {"ratios": tables.ratios(rounds), "runs": runs}, reports, status
    if asked.find_max_rate:
        texts = [wanted.text for wanted in asked.objectives]
        if any(not report.valid for report in reports):
            console.print("Some runs were not valid: there the generator was the limit.")
        console.print(
            f"highest rate with {', '.join(texts)}: "
            + (f"{rate_hz:,.1f} /s" if rate_hz else "none was found"),
            highlight=False,
        )
        found = {"highest_rate_hz": rate_hz, "objectives": texts, "runs": runs}
        return found, reports, status or (0 if rate_hz else MISSED)
    if len(reports) == 1:
        tables.print_run(reports[0], asked.objectives, console)
    else:
        tables.print_runs(reports, console)
    missed = asked.objectives and not all(
        report.valid and all_met(asked.objectives, report.summary) for report in reports
    )
    result = runs[0] if len(runs) == 1 else {"runs": runs}
    return result, reports, status or (MISSED if missed else 0)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parsed(__doc__, argv)
    try:
        # The bar is imported here though it is drawn later: an import holds up the event loop.
        from rich import progress  # noqa: F401
        from rich.console import Console
    except ImportError:
        return _fail("the tables need rich: pip install 'convserve[client]'")
    # What goes to the standard output has it for itself.
    to_stderr = "-" in (asked.json_to, asked.csv_to)
    terminal = (sys.stderr if to_stderr else sys.stdout).isatty()
    console = Console(stderr=to_stderr, width=None if terminal else 120)
    try:
        _check_outputs(asked)
        if asked.scenario:
            from convserve_client.loadgen import mlperf

            reports: list[Report] = []
            result, status = mlperf.run(asked, console)
        else:
            result, reports, status = run_loop(work(asked, console))
        write(asked, result, reports, list(sys.argv if argv is None else ["bench.py", *argv]))
    except (ClassifierError, Unaskable, SenderDied) as error:
        return _fail(str(error))
    except (OSError, ImportError) as error:
        return _fail(_where(error, asked))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("interrupted before anything was measured")
    return status


def _check_outputs(asked: Asked) -> None:
    """Raises ImportError or OSError for what could not be written once all is measured."""
    if asked.report_to:
        import matplotlib  # noqa: F401
    if asked.hdr_to:
        import hdrh.histogram  # noqa: F401
    for path in (asked.json_to, asked.csv_to, asked.report_to, asked.hdr_to):
        if path not in ("", "-") and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent} for {path}")


def write(
    asked: Asked, result: dict[str, Any], reports: Sequence[Report], command: Sequence[str]
) -> None:
    """The files that were asked for; the page names the command. Raises OSError."""
    from convserve_client.reports import export as files
    from convserve_client.reports import html_report as page

    if asked.json_to:
        files.write(asked.json_to, json.dumps(result, indent=2) + "\n")
    if asked.csv_to:
        files.write(asked.csv_to, files.csv_of(reports))
    if asked.hdr_to:
        files.write(asked.hdr_to, files.hdr_log(reports))
    if asked.report_to and reports:
        files.write(asked.report_to, page.html(reports, asked.objectives, command))


def _where(error: Exception, asked: Asked) -> str:
    """The message, with the option that is to blame where that is known."""
    if isinstance(error, ImportError) and "matplotlib" in str(error):
        return "--report needs matplotlib: pip install 'convserve[report]'"
    if isinstance(error, ImportError) and "hdrh" in str(error):
        return "--hdr needs hdrhistogram: pip install 'convserve[client]'"
    if isinstance(error, ImportError) and "mlperf" in str(error):
        return "--scenario needs MLPerf's LoadGen: pip install 'convserve[mlperf]'"
    return f"--input {asked.plan.input}: {error}" if asked.plan.input != "raw" else str(error)


def _fail(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return NOTHING


if __name__ == "__main__":
    sys.exit(main())
