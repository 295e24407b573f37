"""Command: what callers get when there are more of them than the machine can serve.

    python -m tests.bench_overload --repo .demo/engines --model resnet50 --deadline-ms 100

Two servers of one model, one with each policy: `deadline`, which plans from deadlines and refuses
what can't be in time, and `fixed`, a batch size and a delay as other servers have. Calls come at
Poisson times from a process of their own, on the same cores, whatever became of those before; each
has the deadline, and nobody tries again. Capacity is what 16 callers get in a closed loop, measured
in the same run. The servers take turns, in another order each round; the idle one costs nothing.

An answer is good when it came within the deadline, counted from when its call was due.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from clients.arguments import positive
from server.engines import cores
from tests.bare import processor
from tests.bench_serving import (
    CALLERS,
    ROOT,
    ServedEngine,
    build_if_missing,
    parser_of,
    served_engine,
)

POLICIES: Mapping[str, Sequence[str]] = {
    "deadline": ("--policy", "deadline"),
    # The delay and size that served a lone caller and a crowd best by hand.
    "fixed": ("--policy", "fixed", "--fixed-batch", "8", "--fixed-delay-ms", "2"),
}
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 4.0)  # of the capacity
MAX_IN_FLIGHT = "100000"  # the generator holds nobody back

Reports = dict[tuple[str, float], list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=3, seconds=6.0)
    add = parser.add_argument
    add("--deadline-ms", type=positive, default=100.0, help="of every call (%(default)g)")
    add("--factors", type=_factors, default=FACTORS, help="loads, of capacity (0.5,0.8,1,1.5,2,4)")
    add("--out", type=Path, metavar="STEM", help="write STEM.md, STEM.png and STEM.json")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    repo = args.repo.resolve()
    build_if_missing(repo, args.model, console)
    with ExitStack() as stack:
        servers = {
            policy: stack.enter_context(served_engine(repo, args.model, options=options))
            for policy, options in POLICIES.items()
        }
        capacity_hz, reports = _measure(servers, args, console)
    console.print(_table(capacity_hz, reports, args))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        _write(args.out, capacity_hz, reports, args)
    return 0


def _measure(
    servers: Mapping[str, ServedEngine], args: argparse.Namespace, console: Console
) -> tuple[float, Reports]:
    """Capacity, and the reports of each policy and load, in the order of the rounds."""
    closed_hz: list[float] = []
    reports: Reports = {(policy, factor): [] for factor in args.factors for policy in servers}
    for number in range(args.rounds):
        closed_hz += [
            server.measure(CALLERS, args.seconds / 2)["calls_hz"] for server in servers.values()
        ]
        capacity_hz = median(closed_hz)
        console.print(f"round {number + 1} of {args.rounds}: capacity {capacity_hz:,.1f} calls/s")
        for factor in args.factors:
            order = list(servers)[:: -1 if number % 2 else 1]
            for policy in order:
                report = servers[policy].load(
                    *("--rate", str(factor * capacity_hz), "--seed", str(number + 1)),
                    *("--deadline-ms", str(args.deadline_ms), "--max-in-flight", MAX_IN_FLIGHT),
                    seconds=args.seconds,
                )
                report["capacity_hz"] = capacity_hz
                reports[policy, factor].append(report)
                console.print(
                    f"  {factor:.1f} x, {policy}: {report['goodput_hz']:,.1f} of "
                    f"{factor * capacity_hz:,.1f} /s in time"
                )
    return median(closed_hz), reports


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of the runs of one policy and load."""

    def middle(figure: Callable[[Mapping[str, Any]], float]) -> float:
        return median(figure(run) for run in runs)

    def share(of: Callable[[Mapping[str, Any]], float]) -> float:
        return middle(lambda run: of(run) / max(1, sum(run["counts"].values())))

    return {
        "offered_hz": middle(lambda run: run["rate_hz"]),
        "goodput_hz": middle(lambda run: run["goodput_hz"]),
        "of_capacity": middle(lambda run: run["goodput_hz"] / run["capacity_hz"]),
        "in_time": share(lambda run: run["in_time"]),
        "late": share(lambda run: run["late"] + run["counts"].get("DEADLINE_EXCEEDED", 0)),
        "refused": share(lambda run: run["counts"].get("RESOURCE_EXHAUSTED", 0)),
        "p99_ms": middle(lambda run: run["latency_ms"].get("p99", nan)),
        "rows": middle(lambda run: run["server_mean_batch_rows"] or 0.0),
        "lag_ms": middle(lambda run: run["lag_p99_ms"]),
    }


HEADINGS = (
    "load",
    "policy",
    "offered /s",
    "in time /s",
    "of capacity",
    "in time",
    "late",
    "refused",
    "p99 of answers",
    "rows a batch",
    "sent late, p99",
)


def _rows(reports: Reports) -> list[list[str]]:
    rows = []
    for (policy, factor), runs in reports.items():
        figures = _figures(runs)
        rows.append(
            [
                f"{factor:.1f} x",
                policy,
                f"{figures['offered_hz']:,.0f}",
                f"{figures['goodput_hz']:,.1f}",
                f"{figures['of_capacity']:.1%}",
                f"{figures['in_time']:.1%}",
                f"{figures['late']:.2%}",
                f"{figures['refused']:.1%}",
                "none" if isnan(figures["p99_ms"]) else f"{figures['p99_ms']:.1f} ms",
                f"{figures['rows']:.1f}",
                f"{figures['lag_ms']:.1f} ms",
            ]
        )
    return rows


def _title(capacity_hz: float, args: argparse.Namespace) -> str:
    return (
        f"{args.model}, deadlines of {args.deadline_ms:g} ms, "
        f"capacity {capacity_hz:,.0f} calls a second"
    )


def _table(capacity_hz: float, reports: Reports, args: argparse.Namespace) -> Table:
    table = Table(title=_title(capacity_hz, args), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for number, row in enumerate(_rows(reports), 1):
        table.add_row(*row, end_section=number % len(POLICIES) == 0)
    return table


def _write(stem: Path, capacity_hz: float, reports: Reports, args: argparse.Namespace) -> None:
    factors = ",".join(f"{factor:g}" for factor in args.factors)
    command = (
        f"python -m tests.bench_overload --repo REPO --model {args.model} "
        f"--deadline-ms {args.deadline_ms:g} --rounds {args.rounds} --seconds {args.seconds:g} "
        f"--factors {factors} --out {stem}"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("openvino", "grpcio"))
    lines = [
        f"# Overload: {_title(capacity_hz, args)}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}; {processor()}, {cores()} cores, client on the same; "
        f"Python {platform.python_version()}, {versions}; convserve at {_commit()}. "
        f"Medians of {args.rounds} rounds of {args.seconds:g} s a load and policy.",
        "",
        f"    {command}",
        "",
        f"![goodput against offered load]({stem.name}.png)",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---" + "|---:" * (len(HEADINGS) - 2) + "|",
        *("| " + " | ".join(row) + " |" for row in _rows(reports)),
        "",
        "`deadline` is this server as it comes; `fixed` is the same server with `--policy fixed "
        "--fixed-batch 8 --fixed-delay-ms 2`: a size and a delay, no deadlines. In time: within "
        "the deadline from when the call was due. Late: an answer after it, or none when it "
        "passed. Capacity: answers a second to 16 callers in a closed loop, measured each round.",
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines))
    figures = [
        {"policy": policy, "load": factor}
        | {name: None if isnan(value) else value for name, value in _figures(runs).items()}
        for (policy, factor), runs in reports.items()
    ]
    stem.with_suffix(".json").write_text(
        json.dumps({"capacity_hz": capacity_hz, "figures": figures}, indent=1) + "\n"
    )
    _plot(stem.with_suffix(".png"), capacity_hz, reports, args)


def _plot(path: Path, capacity_hz: float, reports: Reports, args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(capacity_hz, color="0.6", linewidth=1, linestyle="--")
    axes.annotate("capacity", (0, capacity_hz), (3, 3), textcoords="offset points", color="0.4")
    for policy, colour in zip(POLICIES, ("#1f6f8b", "#c8553d"), strict=True):
        points = [_figures(reports[policy, factor]) for factor in args.factors]
        offered = [point["offered_hz"] for point in points]
        good = [point["goodput_hz"] for point in points]
        axes.plot(offered, good, marker="o", color=colour, label=policy)
        axes.annotate(
            f"--policy {policy}",
            (offered[-1], good[-1]),
            (0, 8),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(
        xlabel="offered calls a second",
        ylabel=f"answered within {args.deadline_ms:g} ms, a second",
        title=_title(capacity_hz, args),
        xlim=(0, None),
        ylim=(0, 1.15 * capacity_hz),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _factors(text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < 100 for factor in factors):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0, as in 0.5,1,2")
    return factors


if __name__ == "__main__":
    sys.exit(main())
