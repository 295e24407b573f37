"""Command: responses in time under overload, with each scheduler.

    python -m tests.benchmarks.overload --repo .demo/engines --model resnet50 --deadline-ms 100

Two servers serve one model. `deadline` schedules by deadlines and refuses requests that cannot be
answered in time. `fixed` has a fixed batch size and delay, like other servers. Another process on
the same cores sends requests at Poisson times, independent of earlier responses. Each request has
the deadline, and none is retried. Capacity is the rate of 16 callers in a closed loop, measured in
the same run. The servers take turns, and the order alternates by round; the idle one uses no CPU
time.

A response is in time if it arrives within the deadline, which starts when the request is due.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from convserve_client.loadgen.argument_types import positive
from tests.benchmarks.options import build_if_missing, command_parser, console
from tests.benchmarks.reports.overload import HEADINGS, rows, title, write_page
from tests.benchmarks.reports.provenance import date_and_commit, machine
from tests.benchmarks.targets.served import CALLERS, ServedEngine, served_engine

SCHEDULERS: Mapping[str, Sequence[str]] = {
    "deadline": ("--scheduler", "deadline"),
    # Tuned by hand: the best compromise between a single caller and many.
    "fixed": ("--scheduler", "fixed", "--fixed-batch", "8", "--fixed-delay-ms", "2"),
}
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 4.0)  # of capacity
MAX_IN_FLIGHT = "100000"  # high enough that the generator never holds a request back

Reports = dict[tuple[str, float], list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, rounds=3, seconds=6.0)
    add = parser.add_argument
    add(
        "--deadline-ms", type=positive, default=100.0, help="deadline of each request (%(default)g)"
    )
    add(
        "--factors",
        type=_factors,
        default=FACTORS,
        help="loads as multiples of the capacity (0.5,0.8,1,1.5,2,4)",
    )
    add("--out", type=Path, metavar="STEM", help="write STEM.md, STEM.svg and STEM.json")
    args = parser.parse_args(argv)
    screen = console(width=140)
    repo = args.repo.resolve()
    build_if_missing(repo, args.model, screen)
    with ExitStack() as stack:
        servers = {
            scheduler: stack.enter_context(served_engine(repo, args.model, options=options))
            for scheduler, options in SCHEDULERS.items()
        }
        capacity_hz, reports = _measure(servers, args, screen)
    results = _results(capacity_hz, reports, args)
    screen.print(_table(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        write_page(args.out, results)
    return 0


def _measure(
    servers: Mapping[str, ServedEngine], args: argparse.Namespace, console: Console
) -> tuple[float, Reports]:
    """The capacity, and the reports of each scheduler and load in the order of the rounds."""
    closed_hz: list[float] = []
    reports: Reports = {(scheduler, factor): [] for factor in args.factors for scheduler in servers}
    for number in range(args.rounds):
        closed_hz += [
            server.measure(CALLERS, args.seconds / 2)["calls_hz"] for server in servers.values()
        ]
        capacity_hz = median(closed_hz)
        console.print(
            f"round {number + 1} of {args.rounds}: capacity {capacity_hz:,.1f} requests/s"
        )
        for factor in args.factors:
            order = list(servers)[:: -1 if number % 2 else 1]
            for scheduler in order:
                report = servers[scheduler].load(
                    *("--rate-hz", str(factor * capacity_hz), "--seed", str(number + 1)),
                    *("--deadline-ms", str(args.deadline_ms), "--max-in-flight", MAX_IN_FLIGHT),
                    seconds=args.seconds,
                )
                report["capacity_hz"] = capacity_hz
                reports[scheduler, factor].append(report)
                console.print(
                    f"  {factor:.1f} x, {scheduler}: {report['goodput_hz']:,.1f} of "
                    f"{factor * capacity_hz:,.1f} /s in time"
                )
    return median(closed_hz), reports


def _results(capacity_hz: float, reports: Reports, args: argparse.Namespace) -> dict[str, Any]:
    """The contents of STEM.json."""
    return {
        "model": args.model,
        "deadline_ms": args.deadline_ms,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "capacity_hz": capacity_hz,
        **machine(),
        **date_and_commit(),
        "figures": [
            {"scheduler": scheduler, "load": factor, **_figures(runs)}
            for (scheduler, factor), runs in reports.items()
        ],
    }


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Medians of the runs of one scheduler and load."""

    def middle(figure: Callable[[Mapping[str, Any]], float]) -> float:
        return median(figure(run) for run in runs)

    def fraction(count: Callable[[Mapping[str, Any]], float]) -> float:
        return middle(lambda run: count(run) / max(1, sum(run["counts"].values())))

    p99_ms = [run["latency_ms"]["p99"] for run in runs if "p99" in run["latency_ms"]]
    return {
        "offered_hz": middle(lambda run: run["rate_hz"]),
        "goodput_hz": middle(lambda run: run["goodput_hz"]),
        "of_capacity": middle(lambda run: run["goodput_hz"] / run["capacity_hz"]),
        "in_time": fraction(lambda run: run["in_time"]),
        "late": fraction(lambda run: run["late"] + run["counts"].get("DEADLINE_EXCEEDED", 0)),
        "refused": fraction(lambda run: run["counts"].get("RESOURCE_EXHAUSTED", 0)),
        "p99_ms": median(p99_ms) if p99_ms else None,  # without runs that had no answers
        "rows": middle(lambda run: run["server_mean_batch_rows"] or 0.0),
        "lag_ms": middle(lambda run: run["lag_p99_ms"]),
    }


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(title=title(results), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for number, row in enumerate(rows(results), 1):
        table.add_row(*row, end_section=number % len(SCHEDULERS) == 0)
    return table


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < 100 for factor in factors):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers between 0 and 100, separated by commas, like 0.5,1,2"
        )
    return factors


if __name__ == "__main__":
    sys.exit(main())
