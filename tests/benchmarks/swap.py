"""Command: effect of new versions on the requests of clients.

    python -m tests.benchmarks.swap --repo .demo/engines --model resnet50 --swaps 10

The server uses a copy of the repository with the model's newest version. First, 16 callers in a
closed loop measure its capacity. Then another process on the same cores sends requests at Poisson
times at 60 % of this rate: first without swaps, then while one version after the other is published
and replaces the version before it, without pauses. So the second run includes all work of a swap:
hashing, compiling, golden inputs, profile, warm-up, switch and drain.

The exit status is 1 if a request was lost or failed. NOT_SENT counts the requests that the load
generator had no room for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from convserve_client.loadgen.argument_types import at_least, positive
from server.api.stubs import classify_pb2 as pb
from server.process.cores import available_cores
from server.repository import writer
from server.repository.contents import VersionEntry
from tests.benchmarks.options import add_json, build_if_missing, command_parser, console
from tests.benchmarks.targets.bare import newest_version
from tests.benchmarks.targets.served import CALLERS, ServedEngine, served_engine

READY, UNLOADED = pb.Model.READY, pb.Model.UNLOADED
MAX_SWAP_S = 120.0
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, rounds=1, seconds=10.0)
    add = parser.add_argument
    add("--swaps", type=at_least(1), default=10, help="versions to publish per round (%(default)s)")
    add(
        "--factor",
        type=positive,
        default=0.6,
        help="load as a fraction of the capacity (%(default)g)",
    )
    add(
        "--deadline-ms",
        type=positive,
        default=2000.0,
        help="deadline of each request (%(default)g)",
    )
    add_json(parser)
    args = parser.parse_args(argv)
    screen = console()
    build_if_missing(args.repo.resolve(), args.model, screen)
    with tempfile.TemporaryDirectory(prefix="bench-swap-") as folder:
        repo = Path(folder)
        sample = newest_version(args.repo, args.model)
        _publish(repo, sample)
        options = ("--bake-time-s", "0", "--golden-interval-s", "0")
        with served_engine(repo, args.model, options=options) as server:
            rounds = [_round(server, repo, sample, args, screen) for _ in range(args.rounds)]
    screen.print(_table(rounds, args))
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1) + "\n")
    return 1 if any(_failed(one["during"]) for one in rounds) else 0


def _round(
    server: ServedEngine,
    repo: Path,
    sample: VersionEntry,
    args: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    capacity_hz = server.measure(CALLERS, args.seconds / 2)["calls_hz"]
    rate = ("--rate-hz", str(args.factor * capacity_hz), "--deadline-ms", str(args.deadline_ms))
    console.print(f"capacity {capacity_hz:,.1f} requests/s; {args.factor:.0%} of it without swaps")
    before = server.load(*rate, seconds=args.seconds)
    console.print(f"  p99 {before['latency_ms']['p99']:.1f} ms; now with {args.swaps} swaps")
    swaps_s: list[float] = []
    reports: list[dict[str, Any]] = []
    load_ended = threading.Event()

    def load() -> None:
        try:
            while len(swaps_s) < args.swaps:
                reports.append(server.load(*rate, seconds=args.seconds))
        finally:
            load_ended.set()

    loading = threading.Thread(target=load)
    loading.start()
    try:
        while len(swaps_s) < args.swaps and not load_ended.is_set():
            swaps_s.append(_swap(server, repo, sample))
    finally:
        swaps_s += [0.0] * (args.swaps - len(swaps_s))  # ends the load if a swap failed
        loading.join()
    console.print(f"  p99 {max(one['latency_ms']['p99'] for one in reports):.1f} ms")
    return {"capacity_hz": capacity_hz, "before": [before], "during": reports, "swaps_s": swaps_s}


def _swap(server: ServedEngine, repo: Path, sample: VersionEntry) -> float:
    """Publishes a version. Returns the seconds until only this version is loaded."""
    version = _publish(repo, sample)
    began_s = time.monotonic()
    with server.stub() as stub:

        def only_new_version_is_loaded() -> bool:
            listing = stub.ListModels(pb.ListModelsRequest(), timeout=10)
            states = {model.version: model.state for model in listing.models}
            return states.get(version) == READY and states[version - 1] == UNLOADED

        _wait_until(
            only_new_version_is_loaded,
            f"version {version} did not replace version {version - 1} within {MAX_SWAP_S:g} s",
        )
    took_s = time.monotonic() - began_s
    shutil.rmtree(repo / sample.model / str(version - 1))
    return took_s


def _wait_until(condition: Callable[[], bool], error: str) -> None:
    ends_s = time.monotonic() + MAX_SWAP_S
    while not condition():
        if time.monotonic() > ends_s:
            raise SystemExit(f"bench: {error}")
        time.sleep(POLL_S)


def _publish(repo: Path, sample: VersionEntry) -> int:
    """Publishes a copy of the sample as the next version, like a build does."""
    assert sample.manifest is not None
    with writer.staging(repo, sample.model) as staged:
        for file in sample.manifest.files():
            shutil.copyfile(sample.folder / file.name, staged / file.name)
        return writer.publish(repo, staged, sample.manifest).version


def _by_status(reports: Sequence[dict[str, Any]]) -> str:
    """Failed requests by status code, as text."""
    codes: Counter[str] = Counter()
    for report in reports:
        codes.update(report["counts"])
    del codes["OK"]
    return ", ".join(f"{count:,} {code}" for code, count in codes.most_common()) or "0"


def _failed(reports: Sequence[dict[str, Any]]) -> int:
    """Number of failed requests."""
    return sum(
        count for report in reports for code, count in report["counts"].items() if code != "OK"
    )


def _table(rounds: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    load = f"{args.swaps} swaps at {args.factor:.0%} of capacity"
    title = f"{args.model}, {load}, {available_cores()} cores"
    table = Table(title=title, title_justify="left")
    for heading in ("round", "", "requests", "failed", "p50", "p99", "p99 / p99 before"):
        table.add_column(heading, justify="right" if heading else "left")
    for number, one in enumerate(rounds, 1):
        before_ms = _percentile(one["before"], "p99")
        for name in ("before", "during"):
            reports = one[name]
            p99_ms = _percentile(reports, "p99")
            table.add_row(
                str(number),
                name,
                f"{sum(sum(report['counts'].values()) for report in reports):,}",
                _by_status(reports),
                f"{_percentile(reports, 'p50'):.1f} ms",
                f"{p99_ms:.1f} ms",
                f"{p99_ms / before_ms:.2f} x",
            )
        took = [seconds for seconds in one["swaps_s"] if seconds]
        swap = f"{median(took):.1f} s per swap" if took else "no swap"
        table.add_row("", swap, end_section=True)
    return table


def _percentile(reports: Sequence[dict[str, Any]], name: str) -> float:
    """The median over the runs, which are all as long as the run before the swaps."""
    return float(median(report["latency_ms"][name] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
