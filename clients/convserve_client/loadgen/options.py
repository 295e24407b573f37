"""Options of the bench command: checks the arguments and makes the plan."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convserve_client.loadgen.arrivals import read_trace
from convserve_client.loadgen.plan import Plan, combine
from convserve_client.loadgen.results.objective import Objective
from convserve_client.security.access import Access
from convserve_client.security.arguments import access_from

PROTOCOLS = ("classify", "oip")
DEFAULT_CALLERS = 16
DEFAULT_MAX_IN_FLIGHT, DEFAULT_MAX_IN_FLIGHT_OFFLINE = 1024, 16
DEFAULT_DEADLINE_MS, DEFAULT_SCENARIO_DEADLINE_MS = 1000.0, 30_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the command: a plan, and what to do with it."""

    plan: Plan
    concurrencies: tuple[int, ...]  # one run for each
    rates_hz: tuple[float, ...]
    sweep: bool
    find_max_rate: bool
    tolerance: float
    compare: tuple[Plan, Plan] | None
    rounds: int
    scenario: str
    mlperf_dir: Path
    mlperf_latency_s: float | None
    objectives: tuple[Objective, ...]
    json_path: str
    csv_path: str
    report_path: str
    hdr_path: str


def options_from(args: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    """Raises ValueError if options contradict each other, or a file of TLS cannot be used."""
    _check_combination(args)
    targets = [args.target, *(args.compare or ())]
    addresses = [_split_target(text, args.protocol)[1] for text in targets]
    plan = _plan(args, access_from(args, environ, addresses))
    closed = not args.rate_hz and not args.trace
    return Options(
        plan=plan,
        concurrencies=tuple(args.concurrency or ((DEFAULT_CALLERS,) if closed else ())),
        rates_hz=tuple(args.rate_hz or ()),
        sweep=args.sweep,
        find_max_rate=args.find_max_rate,
        tolerance=args.tolerance,
        compare=_compared_plans(args, plan),
        rounds=args.rounds,
        scenario=args.scenario,
        mlperf_dir=args.mlperf_dir,
        mlperf_latency_s=args.mlperf_latency_ms and args.mlperf_latency_ms / 1e3,
        objectives=tuple(args.objective),
        json_path=args.json,
        csv_path=args.csv,
        report_path=args.report,
        hdr_path=args.hdr,
    )


def _check_combination(args: argparse.Namespace) -> None:
    values = args.rate_hz or args.concurrency or [0]
    if args.trace and args.concurrency:
        raise ValueError("--trace is an open loop; it cannot be used with --concurrency")
    if args.find_max_rate and not args.objective:
        raise ValueError("--find-max-rate needs an --objective, for example 'p99<15ms'")
    if (args.find_max_rate or args.sweep) and args.trace:
        raise ValueError("--sweep and --find-max-rate choose rates; they cannot use a --trace")
    if len(values) > 1 and (args.find_max_rate or args.compare):
        raise ValueError("--find-max-rate and --compare take only one --rate-hz or --concurrency")
    if args.sweep and (args.rate_hz or args.concurrency):
        raise ValueError("--sweep chooses the load; omit --rate-hz and --concurrency")


def _plan(args: argparse.Namespace, access: Access) -> Plan:
    """Plan of the first run."""
    protocol, target = _split_target(args.target, args.protocol)
    closed = not args.rate_hz and not args.trace
    default_ms = DEFAULT_SCENARIO_DEADLINE_MS if args.scenario else DEFAULT_DEADLINE_MS
    default_in_flight = (
        DEFAULT_MAX_IN_FLIGHT_OFFLINE if args.scenario == "Offline" else DEFAULT_MAX_IN_FLIGHT
    )
    return Plan(
        target=target,
        protocol=protocol,
        classes=combine(
            args.model,
            args.images_per_call,
            args.priority,
            args.deadline_ms or [(default_ms, 1.0)],
            args.version,
        ),
        concurrency=(args.concurrency or [DEFAULT_CALLERS])[0] if closed else None,
        rate_hz=args.rate_hz[0] if args.rate_hz else None,
        arrivals="trace" if args.trace else args.arrivals,
        burst=args.burst,
        trace=_read_trace(args.trace) if args.trace else (),
        seed=args.seed,
        duration_s=args.duration_s,
        warmup_s=args.warmup_s,
        windows=args.windows,
        input=args.input,
        raw=args.raw,
        shapes=tuple(args.shape),
        outputs=tuple(args.outputs),
        obey_retry_after=args.obey_retry_after,
        channels=args.channels,
        processes=args.processes,
        max_in_flight=args.max_in_flight or default_in_flight,
        access=access,
        metrics_url=_metrics_url(args.metrics_url, target, access),
        server_pids=tuple(args.server_pid),
    )


def _read_trace(path: str) -> tuple[float, ...]:
    try:
        return tuple(read_trace(Path(path).read_text("utf-8-sig").splitlines()))
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--trace {path}: {error}") from None


def _compared_plans(args: argparse.Namespace, plan: Plan) -> tuple[Plan, Plan] | None:
    if not args.compare:
        return None
    a, b = (
        replace(
            plan,
            protocol=protocol,
            target=target,
            metrics_url=_metrics_url(None, target, plan.access),
        )
        for protocol, target in (_split_target(text, args.protocol) for text in args.compare)
    )
    return a, b


def _split_target(text: str, default_protocol: str) -> tuple[Any, str]:
    """Protocol and HOST:PORT of "[PROTOCOL://]HOST:PORT"."""
    protocol, separator, address = text.rpartition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(f"{text}: unknown protocol {protocol!r}; use {' or '.join(PROTOCOLS)}")
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{text!r} is not a target; write HOST:PORT")
    return protocol or default_protocol, address


def _metrics_url(given: str | None, target: str, access: Access) -> str:
    if given is not None:
        return "" if given == "none" else given
    host, _, port = target.rpartition(":")
    scheme = "https" if access.tls else "http"
    return f"{scheme}://{host}:8000/metrics" if port == "8001" else ""
