"""Command: what callers notice of a new version.

    python -m tests.benchmarks.swap --repo .demo/engines --model resnet50 --swaps 10

A server follows a repository of its own, a copy of the model's newest version. Capacity is what 16
callers get in a closed loop. Then calls come at Poisson times at 60 % of it, from a process of
their own on the same cores: for a while in peace, and then while one version after the other is
published and takes the place of the one before, with no pause between swaps. So the whole of the
second run is swap window: hashing, compiling, golden inputs, profile, warm-up, the move, the drain.

Exit status 1 where a call was lost or failed. NOT_SENT are those the generator had no room for.
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
from tests.benchmarks.bare import newest_version
from tests.benchmarks.serving import (
    CALLERS,
    ServedEngine,
    build_if_missing,
    parser_of,
    served_engine,
)

READY, UNLOADED = pb.Model.READY, pb.Model.UNLOADED
SWAP_S = 120.0  # longer is a failure
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=1, seconds=10.0)
    add = parser.add_argument
    add("--swaps", type=at_least(1), default=10, help="versions published a round (%(default)s)")
    add("--factor", type=positive, default=0.6, help="load, of capacity (%(default)g)")
    add("--deadline-ms", type=positive, default=2000.0, help="of every call (%(default)g)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    build_if_missing(args.repo.resolve(), args.model, console)
    with tempfile.TemporaryDirectory(prefix="bench-swap-") as folder:
        repo = Path(folder)
        sample = newest_version(args.repo, args.model)
        _publish(repo, sample)
        options = ("--bake-time-s", "0", "--golden-interval-s", "0")
        with served_engine(repo, args.model, options=options) as server:
            rounds = [_round(server, repo, sample, args, console) for _ in range(args.rounds)]
    console.print(_table(rounds, args))
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
    console.print(f"capacity {capacity_hz:,.1f} calls/s; {args.factor:.0%} of it, in peace")
    before = server.load(*rate, seconds=args.seconds)
    console.print(f"  p99 {before['latency_ms']['p99']:.1f} ms; now with {args.swaps} swaps")
    swaps_s: list[float] = []
    reports: list[dict[str, Any]] = []
    loaded = threading.Event()  # the load has ended

    def load() -> None:
        try:
            while len(swaps_s) < args.swaps:
                reports.append(server.load(*rate, seconds=args.seconds))
        finally:
            loaded.set()

    loading = threading.Thread(target=load)
    loading.start()
    try:
        while len(swaps_s) < args.swaps and not loaded.is_set():
            swaps_s.append(_swap(server, repo, sample))
    finally:
        swaps_s += [0.0] * (args.swaps - len(swaps_s))  # where one failed: let the load end
        loading.join()
    console.print(f"  p99 {max(one['latency_ms']['p99'] for one in reports):.1f} ms")
    return {"capacity_hz": capacity_hz, "before": [before], "during": reports, "swaps_s": swaps_s}


def _swap(server: ServedEngine, repo: Path, sample: VersionEntry) -> float:
    """Publishes a version and waits until it alone is loaded; seconds from the publication."""
    version = _publish(repo, sample)
    began_s = time.monotonic()
    with server.stub() as stub:

        def there() -> bool:
            listing = stub.ListModels(pb.ListModelsRequest(), timeout=10)
            states = {model.version: model.state for model in listing.models}
            return states.get(version) == READY and states[version - 1] == UNLOADED

        _until(there, f"version {version} was not served alone within {SWAP_S:g} s")
    took_s = time.monotonic() - began_s
    shutil.rmtree(repo / sample.model / str(version - 1))
    return took_s


def _until(there: Callable[[], bool], otherwise: str) -> None:
    ends_s = time.monotonic() + SWAP_S
    while not there():
        if time.monotonic() > ends_s:
            raise SystemExit(f"bench: {otherwise}")
        time.sleep(POLL_S)


def _publish(repo: Path, sample: VersionEntry) -> int:
    """The next version, a copy of the sample, as a builder publishes it."""
    assert sample.manifest is not None
    with writer.staging(repo, sample.model) as staged:
        for file in sample.manifest.files():
            shutil.copyfile(sample.folder / file.name, staged / file.name)
        return writer.publish(repo, staged, sample.manifest).version


def _by_status(reports: Sequence[dict[str, Any]]) -> str:
    """Calls without an answer, by what they ended with."""
    codes: Counter[str] = Counter()
    for report in reports:
        codes.update(report["counts"])
    del codes["OK"]
    return ", ".join(f"{count:,} {code}" for code, count in codes.most_common()) or "0"


def _failed(reports: Sequence[dict[str, Any]]) -> int:
    """Calls without an answer."""
    return sum(
        count for report in reports for code, count in report["counts"].items() if code != "OK"
    )


def _table(rounds: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    load = f"{args.swaps} swaps at {args.factor:.0%} of capacity"
    title = f"{args.model}, {load}, {available_cores()} cores"
    table = Table(title=title, title_justify="left")
    for heading in ("round", "", "calls", "failed", "p50", "p99", "p99 to before"):
        table.add_column(heading, justify="right" if heading else "left")
    for number, one in enumerate(rounds, 1):
        peace = _percentile(one["before"], "p99")
        for name in ("before", "during"):
            reports = one[name]
            p99 = _percentile(reports, "p99")
            table.add_row(
                str(number),
                name,
                f"{sum(sum(report['counts'].values()) for report in reports):,}",
                _by_status(reports),
                f"{_percentile(reports, 'p50'):.1f} ms",
                f"{p99:.1f} ms",
                f"{p99 / peace:.2f} x",
            )
        took = [seconds for seconds in one["swaps_s"] if seconds]
        swap = f"{median(took):.1f} s a swap" if took else "no swap"
        table.add_row("", swap, end_section=True)
    return table


def _percentile(reports: Sequence[dict[str, Any]], name: str) -> float:
    """The median of the runs' own: each is as long as the one in peace."""
    return float(median(report["latency_ms"][name] for report in reports))


if __name__ == "__main__":
    sys.exit(main())
