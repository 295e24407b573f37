"""Command: measures how many calls per second the load generator can send, and at what cost.

    python -m tests.benchmarks.generator

The server answers every call with the same bytes. It runs in a process of its own on the same
machine, so both share the machine. Closed loops find the maximum; open loops at fractions of the
maximum show how late calls are sent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from convserve_client.loadgen.argument_types import positive
from convserve_client.loadgen.event_loop import run_loop
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.results.report import Report
from convserve_client.reports.tables import print_runs

ROOT = Path(__file__).resolve().parent.parent.parent
CALLERS = 32  # of each process
PROCESSES = (1, 2)
FRACTIONS = (0.25, 0.5, 0.75)


@contextmanager
def null_server() -> Iterator[str]:
    """Target of a server that does nothing, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.null_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=positive, default=4.0, help="duration of each run (%(default)g)"
    )
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with null_server() as target:
        plan = Plan(
            target=target,
            classes=(RequestClass(model="small", deadline_ms=10_000),),
            warmup_s=1.0,
            duration_s=args.seconds,
            max_in_flight=10_000,
        )
        for processes in PROCESSES:
            console.print(f"{processes} worker process(es): maximum")
            maximum = run_loop(
                measure(replace(plan, processes=processes, concurrency=CALLERS * processes))
            )
            reports: list[Report] = [maximum]
            for fraction in FRACTIONS:
                rate_hz = fraction * maximum.summary.calls_hz
                one = replace(plan, processes=processes, concurrency=None, rate_hz=rate_hz)
                reports.append(run_loop(measure(one)))
            print_runs(reports, console)
            for report in reports:
                if report.summary.lag_p99_s is not None and report.client_cpu_s_per_call:
                    console.print(
                        f"  {report.summary.calls_hz:,.0f} /s: "
                        f"{report.client_cpu_s_per_call * 1e6:.0f} us of CPU per call, "
                        f"sent late by {report.summary.lag_p99_s * 1e3:.2f} ms (p99)"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
