"""Command line of the bench command."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from convserve_client.loadgen.argument_types import (
    at_least,
    list_of,
    mix_of,
    not_negative,
    objective,
    positive,
    priority,
    shape,
)
from convserve_client.loadgen.options import (
    DEFAULT_CALLERS,
    DEFAULT_DEADLINE_MS,
    DEFAULT_MAX_IN_FLIGHT,
    DEFAULT_MAX_IN_FLIGHT_OFFLINE,
    DEFAULT_SCENARIO_DEADLINE_MS,
    PROTOCOLS,
    Options,
    options_from,
)
from convserve_client.security.arguments import add_access_arguments

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")


def parse_options(description: str, argv: Sequence[str] | None) -> Options:
    """Exits with status 2 and a message if the usage is wrong."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_server(parser)
    add_access_arguments(parser)
    _add_requests(parser)
    _add_load(parser)
    _add_several_runs(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    try:
        return options_from(args, os.environ)
    except ValueError as error:
        parser.error(str(error))


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add(
        "--target",
        default="127.0.0.1:8001",
        metavar="[PROTOCOL://]HOST:PORT",
        help="address of the server (%(default)s)",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="classify",
        help="classify: convserve's own contract; oip: the Open Inference Protocol of any server"
        " (%(default)s)",
    )
    add(
        "--metrics-url",
        metavar="URL",
        help="the server's /metrics, read at the start and the end of the measurement; none: do"
        " not read it (default: port 8000 of the same host if the target has port 8001)",
    )
    add(
        "--server-pid",
        type=list_of(at_least(1)),
        default=[],
        metavar="PID,...",
        help="processes on this machine whose CPU time is measured, including their children",
    )


def _add_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "requests",
        "VALUE=WEIGHT,... is a mix: each request takes one of the values at random, by weight",
    ).add_argument
    mix = "VALUE[=WEIGHT],..."
    add("--model", required=True, type=mix_of(str), metavar=mix, help="model or models")
    add("--version", type=at_least(0), default=0, help="version of the model; 0: newest (0)")
    add(
        "--images-per-call",
        type=mix_of(at_least(1)),
        default=[(1, 1.0)],
        metavar=mix,
        help="images in each request (1)",
    )
    add(
        "--priority",
        type=mix_of(priority),
        default=[(0, 1.0)],
        metavar=mix,
        help="priority of each request; its meaning depends on the protocol (0)",
    )
    add(
        "--deadline-ms",
        type=mix_of(positive),
        metavar=mix,
        help="deadline of each request, from its due time"
        f" ({DEFAULT_DEADLINE_MS:g}; with --scenario {DEFAULT_SCENARIO_DEADLINE_MS:g})",
    )
    add(
        "--input",
        default="raw",
        metavar="raw|jpeg|photographs|digits|PATH",
        help="raw: synthetic pixels of the model's input size; jpeg: synthetic files of 500x375;"
        " photographs, digits: files that come with scikit-learn; PATH: an image file, or a"
        " folder whose files are sent in turn (%(default)s)",
    )
    add("--raw", action="store_true", help="decode and resize files here, send their pixels")
    add(
        "--shape",
        action="append",
        type=shape,
        default=[],
        metavar="NAME:D,D,...",
        help="oip: shape of an input with open dimensions; repeat for each input",
    )
    add(
        "--outputs",
        type=list_of(str),
        default=[],
        metavar="NAME,...",
        help="oip: outputs to request (all)",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load and duration")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency",
        type=list_of(at_least(1)),
        metavar="N,...",
        help="closed loop: N callers, each waits for its answer before it sends again; one run for"
        f" each value ({DEFAULT_CALLERS})",
    )
    loop.add_argument(
        "--rate-hz",
        type=list_of(positive),
        metavar="HZ,...",
        help="open loop: requests per second, whether answers arrive or not; one run for each"
        " value",
    )
    add = group.add_argument
    add(
        "--arrivals",
        choices=("poisson", "constant", "bursts"),
        default="poisson",
        help="arrival process of the open loop (%(default)s)",
    )
    add("--burst", type=at_least(1), default=10, help="requests in each burst (%(default)s)")
    add(
        "--trace",
        metavar="FILE",
        help="open loop: due times in seconds, one per line, repeated; --rate-hz stretches them"
        " to that rate",
    )
    add("--seed", type=int, default=1, help="seed of arrivals and mixes (%(default)s)")
    add("--duration-s", type=positive, default=10.0, help="seconds to measure (%(default)g)")
    add("--warmup-s", type=not_negative, default=2.0, help="seconds before measuring (%(default)g)")
    add(
        "--windows",
        type=at_least(1),
        default=5,
        help="parts of the measurement, for the confidence intervals (%(default)s)",
    )
    add(
        "--channels",
        type=at_least(1),
        help="connections per process; calls above the server's limit for a connection wait"
        " (default: one, and another one whenever the calls in flight reach that limit)",
    )
    add("--processes", type=at_least(1), default=1, help="worker processes (%(default)s)")
    add(
        "--max-in-flight",
        type=at_least(1),
        help="open loop: maximum of unanswered requests per process; requests beyond it are not"
        f" sent and the run is not valid ({DEFAULT_MAX_IN_FLIGHT}); Offline: calls at a time"
        f" ({DEFAULT_MAX_IN_FLIGHT_OFFLINE})",
    )
    add(
        "--obey-retry-after",
        action="store_true",
        help="send a refused request again after the wait that the server asks for, if the"
        " deadline allows",
    )


def _add_several_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several runs")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--sweep",
        action="store_true",
        help="closed loops with 1, 2, 4, ... callers until throughput stops growing, then open"
        " loops at fractions of the maximum",
    )
    mode.add_argument(
        "--find-max-rate",
        action="store_true",
        help="find the highest rate of an open loop that meets every --objective",
    )
    mode.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure two targets in turn and print the ratios B / A",
    )
    mode.add_argument(
        "--scenario",
        choices=SCENARIOS,
        default="",
        help="MLPerf scenario, driven by MLPerf's LoadGen (needs the extra mlperf)",
    )
    add = group.add_argument
    add(
        "--objective",
        action="append",
        type=objective,
        default=[],
        metavar="p99<15ms",
        help="requirement on a run; the exit status is 3 if it is missed. Figures: p50 to p99.9,"
        " max, goodput, calls, images, in_time, late, refused, failed. Can be repeated",
    )
    add(
        "--tolerance",
        type=positive,
        default=0.03,
        help="relative precision of --find-max-rate (%(default)g)",
    )
    add("--rounds", type=at_least(1), default=3, help="rounds of --compare (%(default)s)")
    add(
        "--mlperf-dir",
        type=Path,
        default=Path("mlperf"),
        metavar="DIR",
        help="folder for LoadGen's summary and log (%(default)s)",
    )
    add(
        "--mlperf-latency-ms",
        type=positive,
        metavar="MS",
        help="Server: latency limit at p99; a run with another limit than MLPerf's is not"
        " compliant",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output besides the table").add_argument
    add("--json", default="", metavar="FILE|-", help="the result as JSON; - is standard output")
    add("--csv", default="", metavar="FILE|-", help="one line per run; - is standard output")
    add(
        "--report",
        default="",
        metavar="FILE.html",
        help="HTML report with plots that opens without a network (needs the extra report)",
    )
    add(
        "--hdr",
        default="",
        metavar="FILE.hlog",
        help="latencies as an HdrHistogram log, one line per window (needs the extra hdr)",
    )
