"""Command: compares clients/bench.py with Triton's perf_analyzer on one server.

    python -m tests.benchmarks.perf_analyzer --repo .demo/engines --perf-analyzer PATH

Both send one image of raw pixels per request by the Open Inference Protocol and receive all
outputs. They take turns, and the table shows the median of the ratios of adjacent turns.
perf_analyzer is C++ on grpc++; install it with `pip install perf-analyzer` (glibc 2.38 or newer).

In a closed loop on shared cores, CPU time that the generator does not use is free for the server.
So with a small model the results differ by the cost of the generators. At a `--rate` that both can
keep up with, they agree. perf_analyzer measures latency from when a request is sent, bench.py from
when it is due.
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

from rich.table import Table

from convserve_client.loadgen.argument_types import at_least, positive
from tests.benchmarks.options import build_if_missing, command_parser, console
from tests.benchmarks.targets.served import CALLERS, ServedEngine, served_engine

DEADLINE_MS = 60_000  # of bench.py's requests; those of perf_analyzer have none
WINDOWS = 3  # minimum number of measurement windows of perf_analyzer
STABILITY_PERCENT = "999"  # perf_analyzer accepts windows that differ this much


class Figures(NamedTuple):
    """Result of one turn of one generator."""

    calls_hz: float
    p50_ms: float
    p99_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, rounds=5, seconds=6.0)
    add = parser.add_argument
    add("--perf-analyzer", default="perf_analyzer", help="path of the program (%(default)s)")
    add("--callers", type=at_least(1), default=CALLERS, help="in a closed loop (%(default)s)")
    add("--rate", type=positive, help="open loop: requests/s at Poisson times, without --callers")
    args = parser.parse_args(argv)
    screen = console()
    repo = args.repo.resolve()
    build_if_missing(repo, args.model, screen)
    turns: list[tuple[Figures, Figures]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        served_engine(repo, args.model) as server,
    ):
        pixels = server.request().images[0].raw.data
        input_file = Path(folder) / "image.json"
        image = {"b64": base64.b64encode(pixels).decode()}
        input_file.write_text(json.dumps({"data": [{"image": image}]}))
        _run_bench(server, args, 1.0)  # warm-up
        for number in range(args.rounds):
            if number % 2:
                bench = _run_bench(server, args, args.seconds)
                analyzer = _run_perf_analyzer(server, input_file, args)
            else:
                analyzer = _run_perf_analyzer(server, input_file, args)
                bench = _run_bench(server, args, args.seconds)
            turns.append((analyzer, bench))
            screen.print(
                f"  round {number + 1} of {args.rounds}: perf_analyzer {analyzer}, bench.py {bench}"
            )
    screen.print(_table(args.model, turns))
    return 0


def _run_bench(server: ServedEngine, args: argparse.Namespace, seconds: float) -> Figures:
    load: tuple[str, ...] = ("--concurrency", str(args.callers))
    if args.rate:
        load = ("--rate-hz", str(args.rate))
    load += ("--protocol", "oip", "--input", "raw", "--deadline-ms", str(DEADLINE_MS))
    report = server.load(*load, seconds=seconds)
    if set(report["counts"]) != {"OK"}:
        raise SystemExit(f"bench: requests of bench.py failed: {report['counts']}")
    latency = report["latency_ms"]
    return Figures(report["calls_hz"], latency["p50"], latency["p99"])


def _run_perf_analyzer(server: ServedEngine, input_file: Path, args: argparse.Namespace) -> Figures:
    load = ["--concurrency-range", str(args.callers)]
    if args.rate:
        load = ["--request-rate-range", str(args.rate), "--request-distribution", "poisson"]
    program, seconds = args.perf_analyzer, args.seconds
    command = [program, "-m", server.model, "-i", "grpc", "-u", f"127.0.0.1:{server.port}"]
    command += ["-p", str(round(seconds * 1e3 / WINDOWS)), "-r", str(WINDOWS)]
    command += ["-s", STABILITY_PERCENT]
    command += ["--async", "--max-threads", str(CALLERS), "--input-data", str(input_file), *load]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"bench: --perf-analyzer: {error}") from None
    figures = parse_output(done.stdout)
    if figures is None:
        raise SystemExit(f"bench: {program} printed no results:\n{done.stdout}{done.stderr}")
    return figures


def parse_output(text: str) -> Figures | None:
    """The results of the client that perf_analyzer prints; None if there are none."""
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
    for index, name in enumerate(("requests/s", "p50, ms", "p99, ms")):
        analyzer, bench = ([turn[side][index] for turn in turns] for side in (0, 1))
        ratios = [b / a for a, b in zip(analyzer, bench, strict=True)]
        shown.add_row(
            name,
            f"{median(analyzer):,.2f}",
            f"{median(bench):,.2f}",
            f"{median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
