"""Command: throughput of the load generator (clients/bench.py), and its CPU time per request.

    python -m tests.benchmarks.generator

The target is a server that does nothing, in another process on the same machine. So generator and
server share the CPU. Closed loops measure the maximum rate. Open loops at fractions of this rate
measure how late the requests are sent.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from convserve_client.loadgen.argument_types import positive
from convserve_client.loadgen.event_loop import run_loop
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.results.report import Report
from convserve_client.reports.tables import print_runs
from tests.benchmarks.options import console, plain_parser

ROOT = Path(__file__).resolve().parent.parent.parent
CALLERS = 32  # per process
PROCESSES = (1, 2)
FRACTIONS = (0.25, 0.5, 0.75)  # of the maximum rate


@contextmanager
def null_server() -> Iterator[str]:
    """Address of a server that does nothing, in another process."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.targets.null_server"],
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
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--seconds", type=positive, default=4.0, help="length of each run (%(default)g)")
    args = parser.parse_args(argv)
    screen = console(width=120)
    with null_server() as target:
        plan = Plan(
            target=target,
            classes=(RequestClass(model="small", deadline_ms=10_000),),
            warmup_s=1.0,
            duration_s=args.seconds,
            max_in_flight=10_000,
        )
        for processes in PROCESSES:
            screen.print(f"{processes} worker processes: maximum rate")
            maximum = run_loop(
                measure(replace(plan, processes=processes, concurrency=CALLERS * processes))
            )
            reports: list[Report] = [maximum]
            for fraction in FRACTIONS:
                rate_hz = fraction * maximum.summary.calls_hz
                one = replace(plan, processes=processes, concurrency=None, rate_hz=rate_hz)
                reports.append(run_loop(measure(one)))
            print_runs(reports, screen)
            for report in reports:
                if report.summary.lag_p99_s is not None and report.client_cpu_s_per_call:
                    screen.print(
                        f"  {report.summary.calls_hz:,.0f} requests/s: "
                        f"{report.client_cpu_s_per_call * 1e6:.0f} us of CPU time per request, "
                        f"sent late by {report.summary.lag_p99_s * 1e3:.2f} ms (p99)"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
