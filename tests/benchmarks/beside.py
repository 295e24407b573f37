"""Command: clients/bench.py beside Triton's perf_analyzer, on one server.

    python -m tests.benchmarks.beside --repo .demo/engines --model resnet50 --perf-analyzer PATH

Both ask by the Open Inference Protocol, one image of raw pixels a call, for all outputs, and take
turns; the table has the median of the ratios of neighbouring turns. perf_analyzer is C++ over
grpc++; `pip install perf-analyzer` has it for machines with glibc 2.38 or newer.

In a closed loop a generator on the cores of its server measures itself as well: what it does not
spend the server may. So with a small model the two differ by what they cost, and agree at a
`--rate` that both can keep up with. perf_analyzer counts from when it sends, bench.py from when a
call was due.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from convserve_client.loadgen.argument_types import at_least, positive
from tests.benchmarks.serving import (
    CALLERS,
    ServedEngine,
    build_if_missing,
    parser_of,
    served_engine,
)

DEADLINE_MS = 60_000  # bench.py's calls have one; perf_analyzer's do not
WINDOWS = 3  # of perf_analyzer's, at least; it wants them alike, and we take them as they are
UNSTABLE = "999"


class Figures(NamedTuple):
    """Of one turn of one generator."""

    calls_hz: float
    p50_ms: float
    p99_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=5, seconds=6.0)
    add = parser.add_argument
    add("--perf-analyzer", default="perf_analyzer", help="the program (%(default)s)")
    add("--callers", type=at_least(1), default=CALLERS, help="of a closed loop (%(default)s)")
    add("--rate", type=positive, help="calls a second at Poisson times, instead of callers")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    repo = args.repo.resolve()
    build_if_missing(repo, args.model, console)
    turns: list[tuple[Figures, Figures]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        served_engine(repo, args.model) as server,
    ):
        pixels = server.request().images[0].raw.data
        given = Path(folder) / "image.json"
        image = {"b64": base64.b64encode(pixels).decode()}
        given.write_text(json.dumps({"data": [{"image": image}]}))
        _ours(server, args, 1.0)  # warms up
        for number in range(args.rounds):
            if number % 2:
                ours = _ours(server, args, args.seconds)
                theirs = _theirs(server, given, args)
            else:
                theirs = _theirs(server, given, args)
                ours = _ours(server, args, args.seconds)
            turns.append((theirs, ours))
            console.print(f"  round {number + 1} of {args.rounds}: {theirs} beside {ours}")
    console.print(_table(args.model, turns))
    return 0


def _ours(server: ServedEngine, args: argparse.Namespace, seconds: float) -> Figures:
    load: tuple[str, ...] = ("--concurrency", str(args.callers))
    if args.rate:
        load = ("--rate-hz", str(args.rate))
    load += ("--protocol", "oip", "--input", "raw", "--deadline-ms", str(DEADLINE_MS))
    report = server.load(*load, seconds=seconds)
    if set(report["counts"]) != {"OK"}:
        raise SystemExit(f"bench: not all calls of bench.py were answered: {report['counts']}")
    latency = report["latency_ms"]
    return Figures(report["calls_hz"], latency["p50"], latency["p99"])


def _theirs(server: ServedEngine, given: Path, args: argparse.Namespace) -> Figures:
    load = ["--concurrency-range", str(args.callers)]
    if args.rate:
        load = ["--request-rate-range", str(args.rate), "--request-distribution", "poisson"]
    program, seconds = args.perf_analyzer, args.seconds
    command = [program, "-m", server.model, "-i", "grpc", "-u", f"127.0.0.1:{server.port}"]
    command += ["-p", str(round(seconds * 1e3 / WINDOWS)), "-r", str(WINDOWS), "-s", UNSTABLE]
    command += ["--async", "--max-threads", str(CALLERS), "--input-data", str(given), *load]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"bench: --perf-analyzer: {error}") from None
    figures = told(done.stdout)
    if figures is None:
        raise SystemExit(f"bench: {program} measured nothing:\n{done.stdout}{done.stderr}")
    return figures


def told(text: str) -> Figures | None:
    """What perf_analyzer says of its calls; None where it says nothing."""
    found = [
        re.search(pattern, text)
        for pattern in (r"Throughput: ([\d.]+)", r"p50 latency: (\d+)", r"p99 latency: (\d+)")
    ]
    calls, p50, p99 = (float(match.group(1)) if match else None for match in found)
    if calls is None or p50 is None or p99 is None:
        return None
    return Figures(calls, p50 / 1e3, p99 / 1e3)


def _table(model: str, turns: Sequence[tuple[Figures, Figures]]) -> Table:
    shown = Table(title=f"{model}: medians of {len(turns)} rounds", title_justify="left")
    for number, heading in enumerate(("", "perf_analyzer", "bench.py", "ratio", "range")):
        shown.add_column(heading, justify="right" if number else "left")
    for index, name in enumerate(("calls/s", "p50, ms", "p99, ms")):
        theirs, ours = ([turn[side][index] for turn in turns] for side in (0, 1))
        ratios = [our / their for their, our in zip(theirs, ours, strict=True)]
        shown.add_row(
            name,
            f"{median(theirs):,.2f}",
            f"{median(ours):,.2f}",
            f"{median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
