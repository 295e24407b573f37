"""Command: the page docs/benchmarks/cpu.md: what was measured on this machine, and how.

    python -m tests.benchmarks.page --repo .demo/engines --out docs/benchmarks/cpu.md
    python -m tests.benchmarks.page --repo .demo/engines --models lenet5 --parts served
    python -m tests.benchmarks.page --parts none

Beside the page are its plots, and the figures as JSON. What is measured takes the place of what
that file has of the same model, the rest stays, each with its date; so a page may be made in parts.
On another machine, or with other versions, it begins anew. Curves of overload are those that
`tests.benchmarks.overload --out` has left in the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from convserve_client.loadgen.argument_types import at_least, positive
from tests.benchmarks import cost as bench_cost
from tests.benchmarks import overload as bench_overload
from tests.benchmarks.serving import (
    CALLERS,
    IMAGES_IN_FLIGHT,
    Pairs,
    Setup,
    compare,
    middle_half,
)
from tests.benchmarks.writing import (
    BLUE,
    GREEN,
    GREY,
    RED,
    ROOT,
    machine,
    moment,
    plot,
    save,
    table,
)

DEFAULT_MODELS = ("resnet50", "lenet5", "resnet18")
PARTS = ("served", "cost")
COSTS = (("lenet5", "raw"), ("resnet50", "raw"), ("resnet50", "jpeg"))  # models, and what is sent
JPEG = "files of 500x375"  # what clients/bench.py makes up for --input jpeg
COLOURS = {
    "loop": "#3d405b",
    "transport": BLUE,
    "protobuf": "#7fb2c4",
    "call": "#b08900",
    "decode": GREEN,
    "queue": "#7b5ea7",
    "engine": RED,
    "encode": "#a44a6f",
    "metrics": "#2a9d8f",
    bench_cost.OTHER: GREY,
    bench_cost.UNSPLIT: GREY,
}

Found = dict[str, Any]  # what cpu.json holds


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    page: Path = args.out
    page.parent.mkdir(parents=True, exist_ok=True)
    stored = page.with_suffix(".json")
    found = known(json.loads(stored.read_text()) if stored.exists() else {}, machine())
    repo = args.repo.resolve()

    def keep(kind: str, name: str, figures: dict[str, Any]) -> None:
        """At once: what has been measured is not lost with what comes next."""
        of = {"rounds": args.rounds, "seconds": args.seconds}
        found[kind][name] = figures | moment() | of
        stored.write_text(json.dumps(_ordered(found), indent=1) + "\n")

    if "served" in args.parts:
        for number, model in enumerate(args.models, 1):
            console.print(f"[{number} of {len(args.models)}] {model} behind gRPC, and bare")
            comparison = compare(repo, model, args.rounds, args.seconds, console)
            keep("served", model, asdict(comparison))
    if "cost" in args.parts:
        for model, sent in COSTS:
            if model in args.models:
                console.print(f"what a call of {model} costs, with {sent} images")
                rounds = min(args.rounds, 3)
                cost = bench_cost.measure(repo, model, sent, rounds, args.seconds, console)
                keep("cost", f"{model}, {sent}", asdict(cost))
    write(page, _ordered(found), overloads(page.parent))
    console.print(f"wrote {page}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repo", type=Path, default=ROOT / ".demo" / "engines", help="of models; built into")
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "cpu.md", metavar="FILE.md")
    add("--models", nargs="+", default=DEFAULT_MODELS, help="to measure, or all (%(default)s)")
    add("--parts", nargs="+", choices=(*PARTS, "none"), default=PARTS, help="none: write only")
    add("--rounds", type=at_least(1), default=5, help="turns of each side (%(default)s)")
    add("--seconds", type=positive, default=4.0, help="length of a turn (%(default)g)")
    args = parser.parse_args(argv)
    there = sorted(card.stem for card in (ROOT / "model_repo" / "cards").glob("*.toml"))
    args.models = there if args.models == ["all"] else args.models
    if unknown := sorted(set(args.models) - set(there)):
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(there)}")
    return args


def known(stored: Mapping[str, Any], here: Mapping[str, str]) -> Found:
    """What was measured here before: on this machine, with these versions."""
    if stored.get("machine") != here:
        stored = {}
    return {"machine": dict(here), **{part: dict(stored.get(part, {})) for part in PARTS}}


def overloads(folder: Path) -> dict[str, dict[str, Any]]:
    """What tests.benchmarks.overload has left in the folder, by the names of its files."""
    return {
        file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("overload-*.json"))
    }


def _ordered(found: Found) -> Found:
    """By model, whatever was measured first."""
    return found | {part: dict(sorted(found[part].items())) for part in PARTS}


# --- the page ---------------------------------------------------------------------------------


def write(page: Path, found: Found, overload: Mapping[str, Mapping[str, Any]]) -> None:
    """The page and its plots; the same figures give the same files."""
    here, served, cost = found["machine"], found["served"], found["cost"]
    lines = [
        "# Measured on a CPU",
        "",
        f"{here['processor']}; {here['system']}; {here['versions']}. Callers and server share "
        "these cores. Every line says when, and at which commit, it was measured; `-dirty` is that "
        "commit with changes.",
        "",
        "    make bench                    # measures, and writes this page",
        "    make bench MODELS=all         # with every network there is",
        "    make bench MODEL=lenet5       # one model, as a table; no page",
        "",
    ]
    if served:
        save(_drawn_served(served), page.with_name(f"{page.stem}-served.svg"))
        lines += _served(page, served)
    if cost:
        save(_drawn_cost(cost), page.with_name(f"{page.stem}-cost.svg"))
        lines += _cost(page, cost)
    for stem, one in overload.items():
        lines += _overload(stem, one)
    page.write_text("\n".join(lines).rstrip() + "\n")


def _served(page: Path, served: Mapping[str, Any]) -> list[str]:
    rates = []
    for model, one in served.items():
        single, batched = Pairs(**one["single_hz"]), Pairs(**one["batched_hz"])
        rates.append(
            [
                model,
                f"{median(single.bare):,.1f}",
                str(Setup(**one["best"])),
                f"{median(single.served):,.1f}",
                _ranged(single.ratios(), ".1%"),
                str(one["batched_images"]),
                f"{median(batched.served):,.1f}",
                _ranged(batched.ratios(), ".1%"),
                _when(one),
            ]
        )
    latencies = []
    for model, one in served.items():
        lone = Pairs(**one["lone_ms"])
        low, high = middle_half(lone.differences())
        latencies.append(
            [
                model,
                f"{median(lone.bare):.2f}",
                f"{median(lone.served):.2f}",
                f"{median(lone.differences()):+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                str(len(lone.bare)),
            ]
        )
    untrained = [model for model, one in served.items() if not one["trained"]]
    note = (
        f" Of {', '.join(untrained)} the parameters are drawn at random, which takes the same time."
        if untrained
        else ""
    )
    return [
        "## Behind gRPC, and bare",
        "",
        f"![served to bare throughput, and what serving adds to a lone call]"
        f"({page.stem}-served.svg)",
        "",
        *table(
            (
                "model",
                "bare, images/s",
                "by",
                "1 image a call, images/s",
                "to bare (range)",
                "N",
                "N images a call, images/s",
                "to bare (range)",
                "measured",
            ),
            rates,
        ),
        "",
        "Bare: the engine in a process of its own, all instances of one kind busy, at the batch "
        f"size that gives most. Served: {CALLERS} callers in another process, raw pixels, who ask "
        "and wait; with N images, as many as the engine takes in a batch, by as few callers as "
        f"have {IMAGES_IN_FLIGHT} images between them, or 4. {_turns(served)}; a ratio is that of "
        "two neighbouring turns, and the table has "
        "the median of the ratios and their range." + note,
        "",
        *table(
            (
                "model",
                "bare, ms",
                "a caller alone, ms",
                "added, ms",
                "middle half of that",
                "pairs",
            ),
            latencies,
        ),
        "",
        "A caller alone asks for one image and waits; bare is one batch of 1 on the instance that "
        "is done soonest. Each is the median of turns of a quarter of a second, bare and served "
        "in turn. Added is the median of the differences of neighbouring turns, and beside it is "
        "what half of these differences lie within.",
        "",
    ]


def _cost(page: Path, cost: Mapping[str, Any]) -> list[str]:
    columns = list(cost.values())
    phases = [*bench_cost.PHASES, bench_cost.OTHER, bench_cost.UNSPLIT]
    rows = []
    for phase in phases:
        us = [one["phases_us"].get(phase) for one in columns]
        if any(value is not None for value in us):
            cells = [
                "" if value is None else f"{value:,.1f} ({value / median(one['total_us']):.1%})"
                for value, one in zip(us, columns, strict=True)
            ]
            rows.append([phase, bench_cost.MEANING[phase], *cells])
    totals = [_ranged(one["total_us"], ",.0f") for one in columns]
    rows += [
        ["**all**", "median of the rounds (range)", *totals],
        ["calls/s", "", *(f"{median(one['calls_hz']):,.1f}" for one in columns)],
        ["rows a batch", "", *(f"{one['rows']:.1f}" for one in columns)],
        ["samples", "of the event loop's thread", *(f"{one['samples']:,}" for one in columns)],
        ["measured", "", *(_when(one) for one in columns)],
    ]
    unsplit = {name: one["unsplit"] for name, one in cost.items() if one["unsplit"]}
    return [
        "## What a call costs the server",
        "",
        "Microseconds of processor time a call of one image, user and system.",
        "",
        f"![processor time of a call by phase]({page.stem}-cost.svg)",
        "",
        *table(("phase", "what", *cost), rows, left=2),
        "",
        *(f"The split of {name} was not measured: {why}.\n" for name, why in unsplit.items()),
        f"How: {CALLERS} callers in another process ask and wait; `raw` is pixels of the model's "
        f"size, `jpeg` {JPEG}. The total is the processor time of the server's process and its "
        "children (`/proc/PID/stat`) for each call answered meanwhile, with nothing else watching "
        f"the server. {_turns(cost)}. It is split twice. By thread, from `/proc/PID/task/*/stat` "
        "over the same runs: threads that Python did not start are the engine's, those named "
        "`decode` the decoders', the first is the event loop's. Then the loop's time by samples of "
        f"its stack, py-spy's, {bench_cost.RATE_HZ} times a second for "
        f"{bench_cost.PROFILE_S:.0f} s of another run under the same load: a sample counts for the "
        "phase whose module the innermost function of the server's belongs to "
        "([the table](../../tests/benchmarks/cost.py)). py-spy looks at threads that are at work; "
        "it takes a waiting one for working now and then, so `loop` is rather too large than too "
        "small. A share p of n samples is known to about sqrt(p(1-p)/n).",
        "",
    ]


def _overload(stem: str, one: Mapping[str, Any]) -> list[str]:
    return [
        f"## Overload: {bench_overload.title(one)}",
        "",
        f"![goodput against offered load, by policy]({stem}.svg)",
        "",
        *table(bench_overload.HEADINGS, bench_overload.rows(one), left=2),
        "",
        bench_overload.EXPLAINED,
        "",
        f"Measured {_when(one)}; {one['processor']}; {one['system']}, {one['versions']}. Medians "
        f"of {one['rounds']} rounds of {one['seconds']:g} s a load and policy. "
        f"[How to measure it again]({stem}.md).",
        "",
    ]


def _ranged(values: Sequence[float], form: str) -> str:
    """The median, and what the values lie between."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _turns(entries: Mapping[str, Any]) -> str:
    """How often and how long, said once where all are alike."""
    lengths = {
        f"{len(one.get('calls_hz') or one['single_hz']['bare'])} turns of {one['seconds']:g} s"
        for one in entries.values()
    }
    return f"Each has {' or '.join(sorted(lengths))}"


def _when(one: Mapping[str, Any]) -> str:
    return f"{one['date']}, {one['commit']}"


# --- its plots --------------------------------------------------------------------------------


def _drawn_served(served: Mapping[str, Any]) -> Any:
    models, places = list(served), range(len(served))
    figure, (rates, added) = plot(8, 1.3 + 0.55 * len(models), 2, sharey=True, width_ratios=(5, 4))
    for name, key, offset, colour in (
        ("1 image a call", "single_hz", -0.18, BLUE),
        ("as many as a batch takes", "batched_hz", 0.18, GREEN),
    ):
        ratios = [[100 * ratio for ratio in Pairs(**one[key]).ratios()] for one in served.values()]
        rates.barh(
            [place + offset for place in places],
            [median(of) for of in ratios],
            height=0.34,
            color=colour,
            label=name,
            xerr=_whiskers(ratios, [(min(of), max(of)) for of in ratios]),
            error_kw={"elinewidth": 1, "ecolor": "0.25", "capsize": 2},
        )
    rates.axvline(100, color="0.6", linewidth=1, linestyle="--")
    rates.set(
        xlabel="served to bare images a second, %; whiskers: range",
        yticks=list(places),
        yticklabels=models,
        xlim=(0, None),
    )
    rates.invert_yaxis()
    rates.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    differences = [Pairs(**one["lone_ms"]).differences() for one in served.values()]
    added.errorbar(
        [median(of) for of in differences],
        list(places),
        xerr=_whiskers(differences, [middle_half(of) for of in differences]),
        fmt="o",
        color=RED,
        capsize=3,
    )
    added.set(xlabel="added to a lone call, ms; whiskers: middle half", xlim=(0, None))
    if any(middle_half(of)[0] < 0 for of in differences):
        added.set_xlim(None, None)
        added.axvline(0, color="0.6", linewidth=1)
    for axes in (rates, added):
        axes.grid(axis="x")
    return figure


def _whiskers(
    values: Iterable[Sequence[float]], ends: Iterable[tuple[float, float]]
) -> list[list[float]]:
    """Lengths to the left and to the right of each median."""
    pairs = [
        (median(of) - low, high - median(of)) for of, (low, high) in zip(values, ends, strict=True)
    ]
    return [[left for left, _ in pairs], [right for _, right in pairs]]


def _drawn_cost(cost: Mapping[str, Any]) -> Any:
    """Shares of a call, as its microseconds differ a hundredfold, and of what is neither engine nor
    decoders, which would not be seen beside those, the microseconds."""
    from matplotlib.patches import Patch

    figure, (shares, serving) = plot(9, 1.5 + 0.5 * len(cost), 2, sharey=True)
    rests = [_without(one["phases_us"], "engine", "decode") for one in cost.values()]
    widest_us = max(sum(rest.values()) for rest in rests)
    for place, (one, rest) in enumerate(zip(cost.values(), rests, strict=True)):
        total_us = sum(one["phases_us"].values())
        _stack(shares, place, one["phases_us"], 100 / total_us, legible_us=0.08 * total_us)
        _stack(serving, place, rest, 1.0, legible_us=0.06 * widest_us)
    shown = [phase for phase in COLOURS if any(phase in one["phases_us"] for one in cost.values())]
    figure.legend(
        handles=[Patch(color=COLOURS[phase], label=phase) for phase in shown],
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
        fontsize="small",
        handlelength=1,
        columnspacing=1,
    )
    shares.set(
        xlabel="all of a call, % (in the bars: microseconds)",
        yticks=range(len(cost)),
        yticklabels=list(cost),
        xlim=(0, 125),
        xticks=range(0, 101, 20),
    )
    serving.set(xlabel="all but engine and decoding, microseconds a call")
    serving.margins(x=0.2)
    shares.invert_yaxis()
    return figure


def _without(phases_us: Mapping[str, float], *left_out: str) -> dict[str, float]:
    return {phase: us for phase, us in phases_us.items() if phase not in left_out}


def _stack(
    axes: Any, place: int, phases_us: Mapping[str, float], scale: float, *, legible_us: float
) -> None:
    """One bar, its parts in the phases' colours, what is legible in them, the sum beside it."""
    total_us, at = sum(phases_us.values()), 0.0
    for phase, us in phases_us.items():
        axes.barh(place, us * scale, left=at, height=0.62, color=COLOURS[phase])
        if us >= legible_us:
            axes.text(
                *(at + us * scale / 2, place, f"{us:,.0f}"),
                ha="center",
                va="center",
                color="white",
                fontsize="x-small",
            )
        at += us * scale
    axes.annotate(
        f"{total_us:,.0f} us", (at, place), (4, 0), textcoords="offset points", va="center"
    )


if __name__ == "__main__":
    sys.exit(main())
