"""Command: CPU time of a request in the server, in total and by phase.

    python -m tests.benchmarks.cost --repo .demo/engines --model lenet5

Total: CPU time, user and system, of the server process and its children, divided by the number of
answered requests. 16 callers in another process send requests in a closed loop. No profiler runs
during this measurement.

By phase, in two steps. First by thread: /proc gives the CPU time of each thread during the same
runs. Threads that Python did not start belong to the engine; the others are the decoders' or the
event loop's. Then py-spy samples the stack of the event loop's thread in a run of its own. A sample
belongs to the phase of the innermost function of the server. Without py-spy, or without permission
to use it, only the event loop and the sum of all other threads are known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from rich.table import Table

from tests.benchmarks.cost.measurement import Cost, measure
from tests.benchmarks.options import add_json, command_parser, console


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, rounds=3, seconds=4.0)
    parser.add_argument(
        "--input", default="raw", choices=("raw", "jpeg"), help="images to send (%(default)s)"
    )
    add_json(parser)
    args = parser.parse_args(argv)
    screen = console()
    repo = args.repo.resolve()
    cost = measure(repo, args.model, args.input, args.rounds, args.seconds, screen)
    screen.print(_table(cost))
    if args.json:
        args.json.write_text(json.dumps(asdict(cost), indent=2) + "\n")
    return 0


def _table(cost: Cost) -> Table:
    total_us = median(cost.total_us)
    title = f"{cost.model}, {cost.engine_input}, {median(cost.calls_hz):,.1f} requests/s"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    table.add_column("us per request", justify="right")
    table.add_column("fraction", justify="right")
    for phase, us in cost.phases_us.items():
        table.add_row(phase, f"{us:,.1f}", f"{us / total_us:.1%}")
    table.add_section()
    table.add_row("all", f"{total_us:,.1f}", f"{cost.samples:,} samples")
    return table


if __name__ == "__main__":
    sys.exit(main())
