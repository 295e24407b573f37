"""Command: throughput and latency of a served model, compared with its bare engine.

    python -m tests.benchmarks.serving --repo .demo/engines --model resnet50

Throughput: 16 callers in a closed loop, one raw image per request; and as few callers as keep 64
images in flight (at least 4), with a full batch per request. The reference is the bare engine at
its best batch size, with every instance busy.
Latency: one caller with gRPC's synchronous stub. The reference is one bare instance at batch size
1.

Server and bare engine are measured in turn, while the other one is idle. Each result is the median
of the ratios, or differences, of adjacent turns. The callers share the machine with the server; the
bare engine has it for itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from server.process.cores import available_cores
from tests.benchmarks.options import add_json, build_if_missing, command_parser, console
from tests.benchmarks.pairs import Pairs, middle_half
from tests.benchmarks.targets.bare_process import BareEngine, Setup, bare_engine
from tests.benchmarks.targets.served import CALLERS, ServedEngine, served_engine

IMAGES_IN_FLIGHT = 64  # with several images per request; more would wait longer than a turn lasts
# Turns of a single caller per round. They are short, because the speed of the machine varies.
SINGLE_TURNS, SINGLE_TURN_S = 8, 0.25
SURVEY_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A served model compared with its bare engine."""

    model: str
    engine: str
    trained: bool
    best: Setup  # of the highest throughput
    alone: Setup  # of the lowest latency at batch size 1
    single_hz: Pairs  # images/s with one image per request
    single_rows: float  # median batch size
    batched_images: int  # per request
    batched_callers: int
    batched_hz: Pairs  # images/s with `batched_images` per request
    batched_rows: float
    lone_ms: Pairs  # latency of one image with a single caller


@dataclass(slots=True)
class _Turns:
    """Measurements of one load on the server."""

    images_hz: Pairs = field(default_factory=Pairs)
    rows: list[float] = field(default_factory=list)

    def add(self, report: dict[str, Any]) -> None:
        self.images_hz.served.append(report["images_hz"])
        self.rows.append(report["server_mean_batch_rows"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, rounds=5, seconds=4.0)
    add_json(parser)
    args = parser.parse_args(argv)
    screen = console()
    comparison = compare(args.repo.resolve(), args.model, args.rounds, args.seconds, screen)
    screen.print(_table(comparison))
    if args.json:
        args.json.write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    return 0


def compare(repo: Path, model: str, rounds: int, seconds: float, console: Console) -> Comparison:
    """Measures the model, and builds it first if it is missing. Each turn takes `seconds`."""
    build_if_missing(repo, model, console)
    console.print(f"loading {model}: the bare engine, then the server")
    with bare_engine(repo, model) as bare, served_engine(repo, model) as served:
        best, alone = _best_setups(bare, console)
        images = bare.max_batch
        callers = max(4, min(CALLERS, IMAGES_IN_FLIGHT // images))
        single, batched, lone_ms = _Turns(), _Turns(), Pairs()

        def single_turn() -> None:
            single.add(served.measure(CALLERS, seconds))

        def batched_turn() -> None:
            batched.add(served.measure(callers, seconds, "--images-per-call", str(images)))

        for number in range(1, rounds + 1):
            # The bare turn is between the two, so it is adjacent to both. Their order alternates.
            before, after = (single_turn, batched_turn)[:: -1 if number % 2 else 1]
            before()
            bare_hz = bare.measure(best, seconds)[0]
            single.images_hz.bare.append(bare_hz)
            batched.images_hz.bare.append(bare_hz)
            after()
            _measure_latency(bare, alone, served, lone_ms)
            console.print(
                f"  {model}, round {number} of {rounds}: bare {bare_hz:,.1f} images/s, served "
                f"{single.images_hz.served[-1]:,.1f}, with {images} images per request "
                f"{batched.images_hz.served[-1]:,.1f}; one image alone "
                f"{median(lone_ms.bare[-SINGLE_TURNS:]):.2f} ms bare, "
                f"{median(lone_ms.differences()[-SINGLE_TURNS:]):+.2f} ms served"
            )
    return Comparison(
        model=model,
        engine=bare.engine,
        trained=bare.trained,
        best=best,
        alone=alone,
        single_hz=single.images_hz,
        single_rows=median(single.rows),
        batched_images=images,
        batched_callers=callers,
        batched_hz=batched.images_hz,
        batched_rows=median(batched.rows),
        lone_ms=lone_ms,
    )


def _measure_latency(
    bare: BareEngine, setup: Setup, served: ServedEngine, latencies_ms: Pairs
) -> None:
    """Adds one round of short turns with a single caller."""
    request = served.request()
    with served.stub() as stub:
        for _ in range(SINGLE_TURNS):
            latencies_ms.bare.append(bare.measure(setup, SINGLE_TURN_S)[1] * 1e3)
            latencies_ms.served.append(served.single_caller_ms(stub, request, SINGLE_TURN_S))


def _best_setups(bare: BareEngine, console: Console) -> tuple[Setup, Setup]:
    """The setup with the highest throughput, and the one with the lowest latency of one image."""
    rates_hz: dict[Setup, list[float]] = {}
    for setup in bare.setups:
        rates_hz[setup] = [bare.measure(setup, SURVEY_S)[0]]
        console.print(f"  bare, {setup}: {rates_hz[setup][0]:,.1f} images/s")
    # One short measurement may confuse the two best, so each of them is measured twice more.
    finalists = sorted(rates_hz, key=lambda setup: -rates_hz[setup][0])[:2]
    for setup in finalists * 2:
        rates_hz[setup].append(bare.measure(setup, SURVEY_S)[0])
    alone = min(bare.single_setups, key=lambda setup: bare.measure(setup, SURVEY_S)[1])
    return max(finalists, key=lambda setup: median(rates_hz[setup])), alone


def _table(comparison: Comparison) -> Table:
    def row(name: str, values: Sequence[float], form: str, **style: Any) -> None:
        low, high = middle_half(values)
        extremes = f"{min(values):{form}} to {max(values):{form}}"
        table.add_row(
            name, f"{median(values):{form}}", f"{low:{form}} to {high:{form}}", extremes, **style
        )

    one = comparison
    title = f"{one.model}, {one.engine}, {available_cores()} cores"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("median", "middle half", "range"):
        table.add_column(heading, justify="right")
    row(f"bare engine ({one.best}), images/s", one.single_hz.bare, ",.1f", end_section=True)
    for pairs, callers, images, rows in (
        (one.single_hz, CALLERS, 1, one.single_rows),
        (one.batched_hz, one.batched_callers, one.batched_images, one.batched_rows),
    ):
        row(
            f"served, {callers} callers, {images} per request ({rows:.1f} rows per batch), "
            "images/s",
            pairs.served,
            ",.1f",
        )
        row("  served / bare, by pair", pairs.ratios(), ".1%", end_section=True)
    row(f"bare engine, one image ({one.alone}), ms", one.lone_ms.bare, ".2f")
    row("served, single caller (p50), ms", one.lone_ms.served, ".2f")
    row("  added by serving, by pair, ms", one.lone_ms.differences(), "+.2f")
    return table


if __name__ == "__main__":
    sys.exit(main())
