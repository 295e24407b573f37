"""Command: measures and writes the page docs/benchmarks/cpu.md.

    python -m tests.benchmarks.page --repo .demo/engines --out docs/benchmarks/cpu.md
    python -m tests.benchmarks.page --repo .demo/engines --models lenet5 --parts served
    python -m tests.benchmarks.page --parts none

The plots and a JSON file with all figures are next to the page. New figures replace those of the
same model in the JSON file; the others stay, each with its date. So a page can be measured in
parts. On another machine, or with other library versions, the file starts empty. The page includes
the results that `tests.benchmarks.overload --out` wrote into the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.cost import measurement as cost_measurement
from tests.benchmarks.options import ROOT, add_turns, console, plain_parser
from tests.benchmarks.reports.cost import cost_section
from tests.benchmarks.reports.overload import overload_section
from tests.benchmarks.reports.provenance import date_and_commit, machine
from tests.benchmarks.reports.served import served_section
from tests.benchmarks.serving import compare

DEFAULT_MODELS = ("resnet50", "lenet5", "resnet18")
PARTS = ("served", "cost")
COSTS = (("lenet5", "raw"), ("resnet50", "raw"), ("resnet50", "jpeg"))  # models and inputs

Figures = dict[str, Any]  # the contents of cpu.json


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    screen = console()
    page: Path = args.out
    page.parent.mkdir(parents=True, exist_ok=True)
    stored = page.with_suffix(".json")
    figures = reusable(json.loads(stored.read_text()) if stored.exists() else {}, machine())
    repo = args.repo.resolve()

    def keep(part: str, name: str, results: dict[str, Any]) -> None:
        """Writes the file at once, so that a later failure loses nothing."""
        turns = {"rounds": args.rounds, "seconds": args.seconds}
        figures[part][name] = results | date_and_commit() | turns
        stored.write_text(json.dumps(_sorted(figures), indent=1) + "\n")

    if "served" in args.parts:
        for number, model in enumerate(args.models, 1):
            screen.print(f"[{number} of {len(args.models)}] {model}: served and bare")
            comparison = compare(repo, model, args.rounds, args.seconds, screen)
            keep("served", model, asdict(comparison))
    if "cost" in args.parts:
        for model, engine_input in COSTS:
            if model in args.models:
                screen.print(f"CPU time of a request to {model} with {engine_input} images")
                rounds = min(args.rounds, 3)
                cost = cost_measurement.measure(
                    repo, model, engine_input, rounds, args.seconds, screen
                )
                keep("cost", f"{model}, {engine_input}", asdict(cost))
    write(page, _sorted(figures), overload_results(page.parent))
    screen.print(f"wrote {page}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add(
        "--repo",
        type=Path,
        default=ROOT / ".demo" / "engines",
        help="model repository; missing models are built (%(default)s)",
    )
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "cpu.md", metavar="FILE.md")
    add("--models", nargs="+", default=DEFAULT_MODELS, help="models, or all (%(default)s)")
    add(
        "--parts",
        nargs="+",
        choices=(*PARTS, "none"),
        default=PARTS,
        help="parts to measure; none only writes the page",
    )
    add_turns(parser, rounds=5, seconds=4.0)
    args = parser.parse_args(argv)
    available = sorted(card.stem for card in (ROOT / "model_repo" / "cards").glob("*.toml"))
    args.models = available if args.models == ["all"] else args.models
    if unknown := sorted(set(args.models) - set(available)):
        parser.error(f"unknown model {', '.join(unknown)}; choose from {', '.join(available)}")
    return args


def reusable(stored: Mapping[str, Any], here: Mapping[str, str]) -> Figures:
    """The stored figures if they are from this machine with these library versions."""
    if stored.get("machine") != here:
        stored = {}
    return {"machine": dict(here), **{part: dict(stored.get(part, {})) for part in PARTS}}


def overload_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of tests.benchmarks.overload in the folder, by file name without suffix."""
    return {
        file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("overload-*.json"))
    }


def _sorted(figures: Figures) -> Figures:
    """Sorted by model, independent of the order of measurement."""
    return figures | {part: dict(sorted(figures[part].items())) for part in PARTS}


def write(page: Path, figures: Figures, overload: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the page and its plots. The same figures give the same files."""
    here = figures["machine"]
    lines = [
        "# Benchmarks on a CPU",
        "",
        f"{here['processor']}; {here['system']}; {here['versions']}. Client and server share "
        "these cores. Each result has its date and commit; `-dirty` means uncommitted changes.",
        "",
        "    make bench                    # measure, and write this page",
        "    make bench MODELS=all         # all networks",
        "    make bench MODEL=lenet5       # one model, prints a table, writes no page",
        "",
    ]
    if figures["served"]:
        lines += served_section(page, figures["served"])
    if figures["cost"]:
        lines += cost_section(page, figures["cost"])
    for stem, results in overload.items():
        lines += overload_section(stem, results)
    page.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
