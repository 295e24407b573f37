"""Command: what callers get when there are more of them than the machine can serve.

    python -m tests.benchmarks.overload --repo .demo/engines --model resnet50 --deadline-ms 100

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
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from convserve_client.loadgen.argument_types import positive
from tests.benchmarks.serving import (
    CALLERS,
    ServedEngine,
    build_if_missing,
    parser_of,
    served_engine,
)
from tests.benchmarks.writing import (
    BLUE,
    RED,
    machine,
    moment,
    plot,
    save,
    table,
)

POLICIES: Mapping[str, Sequence[str]] = {
    "deadline": ("--scheduler", "deadline"),
    # The delay and size that served a lone caller and a crowd best by hand.
    "fixed": ("--scheduler", "fixed", "--fixed-batch", "8", "--fixed-delay-ms", "2"),
}
FACTORS = (0.5, 0.8, 1.0, 1.5, 2.0, 4.0)  # of the capacity
MAX_IN_FLIGHT = "100000"  # the generator holds nobody back

Reports = dict[tuple[str, float], list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=3, seconds=6.0)
    add = parser.add_argument
    add("--deadline-ms", type=positive, default=100.0, help="of every call (%(default)g)")
    add("--factors", type=_factors, default=FACTORS, help="loads, of capacity (0.5,0.8,1,1.5,2,4)")
    add("--out", type=Path, metavar="STEM", help="write STEM.md, STEM.svg and STEM.json")
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
    found = _found(capacity_hz, reports, args)
    console.print(_table(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        write(args.out, found)
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
                    *("--rate-hz", str(factor * capacity_hz), "--seed", str(number + 1)),
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


def _found(capacity_hz: float, reports: Reports, args: argparse.Namespace) -> dict[str, Any]:
    """All that STEM.json holds."""
    return {
        "model": args.model,
        "deadline_ms": args.deadline_ms,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "capacity_hz": capacity_hz,
        **machine(),
        **moment(),
        "figures": [
            {"policy": policy, "load": factor, **_figures(runs)}
            for (policy, factor), runs in reports.items()
        ],
    }


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Medians of the runs of one policy and load."""

    def middle(figure: Callable[[Mapping[str, Any]], float]) -> float:
        return median(figure(run) for run in runs)

    def share(of: Callable[[Mapping[str, Any]], float]) -> float:
        return middle(lambda run: of(run) / max(1, sum(run["counts"].values())))

    p99_ms = [run["latency_ms"]["p99"] for run in runs if "p99" in run["latency_ms"]]
    return {
        "offered_hz": middle(lambda run: run["rate_hz"]),
        "goodput_hz": middle(lambda run: run["goodput_hz"]),
        "of_capacity": middle(lambda run: run["goodput_hz"] / run["capacity_hz"]),
        "in_time": share(lambda run: run["in_time"]),
        "late": share(lambda run: run["late"] + run["counts"].get("DEADLINE_EXCEEDED", 0)),
        "refused": share(lambda run: run["counts"].get("RESOURCE_EXHAUSTED", 0)),
        "p99_ms": median(p99_ms) if p99_ms else None,  # of the runs that had any answers
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


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a table under `HEADINGS`."""
    return [
        [
            f"{one['load']:.1f} x",
            one["policy"],
            f"{one['offered_hz']:,.0f}",
            f"{one['goodput_hz']:,.1f}",
            f"{one['of_capacity']:.1%}",
            f"{one['in_time']:.1%}",
            f"{one['late']:.2%}",
            f"{one['refused']:.1%}",
            "none" if one["p99_ms"] is None else f"{one['p99_ms']:.1f} ms",
            f"{one['rows']:.1f}",
            f"{one['lag_ms']:.1f} ms",
        ]
        for one in found["figures"]
    ]


def title(found: Mapping[str, Any]) -> str:
    return (
        f"{found['model']}, deadlines of {found['deadline_ms']:g} ms, "
        f"capacity {found['capacity_hz']:,.0f} calls a second"
    )


def _table(found: Mapping[str, Any]) -> Table:
    shown = Table(title=title(found), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if number < 2 else "right")
    for number, row in enumerate(rows(found), 1):
        shown.add_row(*row, end_section=number % len(POLICIES) == 0)
    return shown


EXPLAINED = (
    "`deadline` is this server as it comes; `fixed` is the same server with `--scheduler fixed "
    "--fixed-batch 8 --fixed-delay-ms 2`: a size and a delay, no deadlines. In time: within "
    "the deadline from when the call was due. Late: an answer after it, or none when it "
    "passed. Capacity: answers a second to 16 callers in a closed loop, measured each round."
)


def write(stem: Path, found: Mapping[str, Any]) -> None:
    """STEM.md and STEM.svg, from what STEM.json holds."""
    factors = ",".join(dict.fromkeys(f"{one['load']:g}" for one in found["figures"]))
    lines = [
        f"# Overload: {title(found)}",
        "",
        f"{found['date']}, convserve at {found['commit']}; {found['processor']}, client on the "
        f"same; {found['system']}, {found['versions']}. "
        f"Medians of {found['rounds']} rounds of {found['seconds']:g} s a load and policy.",
        "",
        f"    python -m tests.benchmarks.overload --repo REPO --model {found['model']} "
        f"--deadline-ms {found['deadline_ms']:g} --rounds {found['rounds']} "
        f"--seconds {found['seconds']:g} --factors {factors} --out {stem}",
        "",
        f"![goodput against offered load]({stem.name}.svg)",
        "",
        *table(HEADINGS, rows(found), left=2),
        "",
        EXPLAINED,
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines))
    save(_drawn(found), stem.with_suffix(".svg"))


def _drawn(found: Mapping[str, Any]) -> Any:
    figure, (axes,) = plot(7, 4.2)
    capacity_hz = found["capacity_hz"]
    axes.axhline(capacity_hz, color="0.6", linewidth=1, linestyle="--")
    axes.annotate("capacity", (0, capacity_hz), (3, 3), textcoords="offset points", color="0.4")
    # The name of each at its end, where the other curve does not go.
    for policy, colour, above in zip(POLICIES, (BLUE, RED), (-16, 8), strict=True):
        points = [one for one in found["figures"] if one["policy"] == policy]
        offered = [point["offered_hz"] for point in points]
        good = [point["goodput_hz"] for point in points]
        axes.plot(offered, good, marker="o", color=colour)
        axes.annotate(
            f"--scheduler {policy}",
            (offered[-1], good[-1]),
            (0, above),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(
        xlabel="offered calls a second",
        ylabel=f"answered within {found['deadline_ms']:g} ms, a second",
        title=title(found),
        xlim=(0, None),
        ylim=(0, 1.15 * max(capacity_hz, *(one["goodput_hz"] for one in found["figures"]))),
    )
    return figure


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
