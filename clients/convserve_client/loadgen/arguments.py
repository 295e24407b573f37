"""The command line of clients/bench.py: what may be asked, and the plan that follows from it."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from convserve_client.loadgen.load import trace
from convserve_client.loadgen.objective import Objective, objective
from convserve_client.loadgen.plan import Plan, mixed

T = TypeVar("T")

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
PROTOCOLS = ("classify", "oip")
DEFAULT_CALLERS = 16
PRIORITY_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command is to do: one plan, or several made from it."""

    plan: Plan
    concurrencies: tuple[int, ...]  # several: a sweep
    rates_hz: tuple[float, ...]
    sweep: bool
    find_max_rate: bool
    tolerance: float
    compare: tuple[Plan, Plan] | None
    rounds: int
    scenario: str
    mlperf_dir: Path
    mlperf_target_s: float | None
    objectives: tuple[Objective, ...]
    json_to: str
    csv_to: str
    report_to: str
    hdr_to: str


def parsed(description: str, argv: Sequence[str] | None) -> Asked:
    """Ends the process with status 2, and says why, where the usage is wrong."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _whom(parser)
    _what(parser)
    _how(parser)
    _search(parser)
    _output(parser)
    args = parser.parse_args(argv)
    try:
        return _asked(args)
    except ValueError as error:
        parser.error(str(error))


def _whom(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("whom").add_argument
    add(
        "--target",
        default="127.0.0.1:8001",
        metavar="[PROTOCOL://]HOST:PORT",
        help="the server (%(default)s)",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="classify",
        help="classify: this project's contract; oip: the Open Inference Protocol, whoever"
        " serves it (%(default)s)",
    )
    add(
        "--metrics-url",
        metavar="URL",
        help="the server's /metrics, read when the measurement begins and ends (of a target at"
        " port 8001: the same host's port 8000; else not read; none: not read)",
    )
    add(
        "--server-pid",
        type=_listed(at_least(1)),
        default=[],
        metavar="PID,...",
        help="processes on this machine whose CPU time is counted, with their children",
    )


def _what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "what", "VALUE=WEIGHT,...: a mix; each request takes one of the values by their weights"
    ).add_argument
    mix = "VALUE[=WEIGHT],..."
    add("--model", required=True, type=_mix(str), metavar=mix, help="the model, or models, to ask")
    add("--version", type=at_least(0), default=0, help="its version; 0 is the newest (0)")
    add(
        "--images-per-call",
        type=_mix(at_least(1)),
        default=[(1, 1.0)],
        metavar=mix,
        help="images a call (1)",
    )
    add(
        "--priority",
        type=_mix(_priority),
        default=[(0, 1.0)],
        metavar=mix,
        help="of each call, as its protocol has it (0)",
    )
    add(
        "--deadline-ms",
        type=_mix(positive),
        metavar=mix,
        help="of each call, counted from when it was due (1000; of a --scenario 30000)",
    )
    add(
        "--input",
        default="raw",
        metavar="raw|jpeg|photographs|digits|PATH",
        help="raw: made-up pixels of the model's own size; jpeg: made-up files of 500x375;"
        " photographs and digits: files that come with scikit-learn; PATH: an image file, or a"
        " folder of them, sent in turn (%(default)s)",
    )
    add("--raw", action="store_true", help="decode and resize files here, send their pixels")
    add(
        "--shape",
        action="append",
        type=_shape,
        default=[],
        metavar="NAME:D,D,...",
        help="oip: the shape of an input whose metadata leaves it open; once for each",
    )
    add(
        "--outputs",
        type=_listed(str),
        default=[],
        metavar="NAME,...",
        help="oip: the outputs to ask for (all)",
    )


def _how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how often and how long")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=_listed(at_least(1)),
        metavar="N,...",
        help=f"closed loop: callers who ask, wait, ask again; several: one run each"
        f" ({DEFAULT_CALLERS})",
    )
    loop.add_argument(
        "--rate",
        type=_listed(positive),
        metavar="HZ,...",
        help="open loop: calls a second, waiting for nobody; several: one run each",
    )
    add = group.add_argument
    add(
        "--arrivals",
        choices=("poisson", "constant", "bursts"),
        default="poisson",
        help="of the open loop (%(default)s)",
    )
    add("--burst", type=at_least(1), default=10, help="calls in each of the bursts (%(default)s)")
    add(
        "--trace",
        metavar="FILE",
        help="open loop: due times in seconds, one a line, over and over; with --rate stretched"
        " to it",
    )
    add("--seed", type=int, default=1, help="of arrivals and mixes (%(default)s)")
    add("--duration", type=positive, default=10.0, help="seconds to measure (%(default)g)")
    add("--warmup", type=not_negative, default=2.0, help="seconds before that (%(default)g)")
    add(
        "--windows",
        type=at_least(1),
        default=5,
        help="the measurement is split into so many, to say how sure its figures are (%(default)s)",
    )
    add("--channels", type=at_least(1), default=1, help="connections a process (%(default)s)")
    add("--processes", type=at_least(1), default=1, help="that send (%(default)s)")
    add(
        "--max-in-flight",
        type=at_least(1),
        help="open loop: most unanswered calls of a process; those due beyond are not sent, and"
        " the run is not valid (1024); Offline: calls at a time (16)",
    )
    add(
        "--obey-hints",
        action="store_true",
        help="send again what was refused, after the wait the server hints at, while the deadline"
        " allows",
    )


def _search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several runs")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--sweep",
        action="store_true",
        help="closed loops of 1, 2, 4, ... callers until no more comes of it, then open loops at"
        " shares of that",
    )
    mode.add_argument(
        "--find-max-rate",
        action="store_true",
        help="the highest rate of the open loop that meets every --objective",
    )
    mode.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two targets, as in --target, in turn; ratios of B to A",
    )
    mode.add_argument(
        "--scenario",
        choices=SCENARIOS,
        default="",
        help="MLPerf's, driven by its own LoadGen (needs the extra mlperf)",
    )
    add = group.add_argument
    add(
        "--objective",
        action="append",
        type=_objective,
        default=[],
        metavar="p99<15ms",
        help="what a run must reach, else the exit status is 3: p50 to p99.9, max, goodput, calls,"
        " images, in_time, late, refused, failed; may be given several times",
    )
    add(
        "--tolerance",
        type=positive,
        default=0.03,
        help="of --find-max-rate: how near it comes (%(default)g)",
    )
    add("--rounds", type=at_least(1), default=3, help="of --compare (%(default)s)")
    add(
        "--mlperf-dir",
        type=Path,
        default=Path("mlperf"),
        metavar="DIR",
        help="where LoadGen writes its summary and log (%(default)s)",
    )
    add(
        "--mlperf-latency-ms",
        type=positive,
        metavar="MS",
        help="Server: the limit at p99; other than MLPerf's own it makes a run not compliant",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output, beside the table").add_argument
    add("--json", default="", metavar="FILE|-", help="the result; - is the standard output")
    add("--csv", default="", metavar="FILE|-", help="a line for each run")
    add(
        "--report",
        default="",
        metavar="FILE.html",
        help="a page with plots that needs no network (needs the extra report)",
    )
    add(
        "--hdr",
        default="",
        metavar="FILE.hlog",
        help="latencies as an HdrHistogram log, a line for each window of each run",
    )


def _asked(args: argparse.Namespace) -> Asked:
    times: Sequence[float] = ()
    if args.trace:
        if args.concurrency:
            raise ValueError("--trace is an open loop, and --concurrency a closed one")
        try:
            times = trace(Path(args.trace).read_text().splitlines())
        except OSError as error:
            raise ValueError(f"--trace {args.trace}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"--trace {args.trace}: {error}") from None
    if args.find_max_rate and not args.objective:
        raise ValueError("--find-max-rate needs an --objective, as in --objective 'p99<15ms'")
    if (args.find_max_rate or args.sweep) and args.trace:
        raise ValueError("--sweep and --find-max-rate choose rates, and a --trace has its own")
    if len(args.rate or args.concurrency or [0]) > 1 and (args.find_max_rate or args.compare):
        raise ValueError("--find-max-rate and --compare take one --rate or --concurrency")
    if args.sweep and (args.rate or args.concurrency):
        raise ValueError("--sweep chooses callers and rates itself")
    closed = not args.rate and not args.trace
    concurrencies = tuple(args.concurrency or ((DEFAULT_CALLERS,) if closed else ()))
    rates = tuple(args.rate or ())
    deadlines_ms = args.deadline_ms or [(30_000.0 if args.scenario else 1000.0, 1.0)]
    protocol, target = _target(args.target, args.protocol)
    plan = Plan(
        target=target,
        protocol=protocol,
        kinds=mixed(args.model, args.images_per_call, args.priority, deadlines_ms, args.version),
        concurrency=concurrencies[0] if concurrencies else None,
        rate_hz=rates[0] if rates else None,
        arrivals="trace" if args.trace else args.arrivals,
        burst=args.burst,
        trace=tuple(times),
        seed=args.seed,
        duration_s=args.duration,
        warmup_s=args.warmup,
        windows=args.windows,
        input=args.input,
        raw=args.raw,
        shapes=tuple(args.shape),
        outputs=tuple(args.outputs),
        obey_hints=args.obey_hints,
        channels=args.channels,
        processes=args.processes,
        max_in_flight=args.max_in_flight or (16 if args.scenario == "Offline" else 1024),
        metrics_url=_metrics_url(args.metrics_url, target),
        server_pids=tuple(args.server_pid),
    )
    return Asked(
        plan=plan,
        concurrencies=concurrencies,
        rates_hz=rates,
        sweep=args.sweep,
        find_max_rate=args.find_max_rate,
        tolerance=args.tolerance,
        compare=_compared(args, plan),
        rounds=args.rounds,
        scenario=args.scenario,
        mlperf_dir=args.mlperf_dir,
        mlperf_target_s=args.mlperf_latency_ms and args.mlperf_latency_ms / 1e3,
        objectives=tuple(args.objective),
        json_to=args.json,
        csv_to=args.csv,
        report_to=args.report,
        hdr_to=args.hdr,
    )


def _compared(args: argparse.Namespace, plan: Plan) -> tuple[Plan, Plan] | None:
    if not args.compare:
        return None
    one, other = (
        replace(plan, protocol=protocol, target=target, metrics_url=_metrics_url(None, target))
        for protocol, target in (_target(text, args.protocol) for text in args.compare)
    )
    return one, other


def _target(text: str, protocol: str) -> tuple[Any, str]:
    """Protocol and HOST:PORT."""
    named, separator, address = text.rpartition("://")
    if separator and named not in PROTOCOLS:
        raise ValueError(f"{text}: the protocol {named!r} is not known; {', '.join(PROTOCOLS)} are")
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{text!r} is no target; write HOST:PORT")
    return named or protocol, address


def _metrics_url(given: str | None, target: str) -> str:
    if given is not None:
        return "" if given == "none" else given
    host, _, port = target.rpartition(":")
    return f"http://{host}:8000/metrics" if port == "8001" else ""


def _listed(of: Callable[[str], T]) -> Callable[[str], list[T]]:
    """For argparse: values separated by commas."""

    def values(text: str) -> list[T]:
        return [of(part.strip()) for part in text.split(",")]

    return _named(values, "list")


def _mix(of: Callable[[str], T]) -> Callable[[str], list[tuple[T, float]]]:
    """For argparse: values separated by commas, each with a weight or of weight 1."""

    def values(text: str) -> list[tuple[T, float]]:
        found = []
        for part in text.split(","):
            value, separator, weight = part.strip().partition("=")
            if not value:
                raise argparse.ArgumentTypeError(f"{text!r} has an empty value")
            found.append((of(value), positive(weight) if separator else 1.0))
        return found

    return _named(values, "mix of VALUE=WEIGHT,...")


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, separator, dimensions = text.rpartition(":")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write NAME:D,D,...")
    return name, tuple(at_least(1)(part) for part in dimensions.split(","))


def _objective(text: str) -> Objective:
    try:
        return objective(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number, no smaller than that."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} given; it must be at least {least}")
        return value

    return _named(number, "whole number")


def _priority(text: str) -> int:
    value = at_least(0)(text)
    if value >= PRIORITY_LIMIT:
        raise argparse.ArgumentTypeError(f"{value} given; it must be below {PRIORITY_LIMIT}")
    return value


def positive(text: str) -> float:
    """For argparse: a number above 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} given; it must be positive and finite")
    return value


def not_negative(text: str) -> float:
    """For argparse: a number that is finite and 0 or above."""
    return 0.0 if float(text) == 0 else positive(text)


def _named(function: Callable[[str], T], name: str) -> Callable[[str], T]:
    function.__name__ = name  # what argparse calls it where a value is none
    return function
