"""Measures the CPU time of a request in a server under load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from tests.benchmarks.cost.phases import UNSPLIT, phase_samples, split_by_phase, thread_group
from tests.benchmarks.cost.sampling import (
    Profiler,
    ProfilerUnavailable,
    thread_times_s,
    time_between,
)
from tests.benchmarks.options import build_if_missing
from tests.benchmarks.targets.served import CALLERS, ServedEngine, served_engine

PROFILE_S = 14.0
LOAD_STARTED_S = 0.05  # CPU time of the event loop after which the load has surely begun


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of the server's CPU time per request of one image."""

    model: str
    engine_input: str  # "raw": pixels of the model's size; "jpeg": files
    calls_hz: list[float]  # one value per round
    total_us: list[float]  # one value per round
    rows: float  # median batch size
    phases_us: dict[str, float]  # sum: the median of total_us
    samples: int  # of the event loop's thread; 0 if its phases are unknown
    unsplit: str  # the reason why they are unknown


def measure(
    repo: Path, model: str, engine_input: str, rounds: int, seconds: float, console: Console
) -> Cost:
    """Serves the model and measures it. Builds it first if it is missing."""
    build_if_missing(repo, model, console)
    console.print(f"loading {model}; input: {engine_input} images")
    calls_hz, total_us, rows = [], [], []
    by_thread: Counter[int] = Counter()
    with served_engine(repo, model) as served:
        options = ("--input", engine_input, "--server-pid", str(served.pid))
        for number in range(1, rounds + 1):
            before = thread_times_s(served.pid)
            report = served.measure(CALLERS, seconds, *options)
            by_thread += time_between(before, thread_times_s(served.pid))
            calls_hz.append(report["calls_hz"])
            total_us.append(report["server_cpu_s_per_call"] * 1e6)
            rows.append(report["server_mean_batch_rows"])
            console.print(
                f"  {model}, {engine_input}, round {number} of {rounds}: {total_us[-1]:,.0f} us "
                f"per request, {calls_hz[-1]:,.1f} requests/s"
            )
        samples, names, unsplit = Counter[str](), dict[int, str](), ""
        try:
            profiler = Profiler(served.pid)
            names = profiler.thread_names()  # first: without permission it fails at once
            samples = _profile(profiler, served, options)
        except ProfilerUnavailable as error:
            unsplit = str(error)
            console.print(f"  not split by phase: {unsplit}")
        groups_s: Counter[str] = Counter()
        for thread, used_s in by_thread.items():
            group = thread_group(thread, names.get(thread, ""), served.pid)
            groups_s[group if group == "loop" or not unsplit else UNSPLIT] += used_s
    return Cost(
        model,
        engine_input,
        calls_hz,
        total_us,
        median(rows),
        split_by_phase(median(total_us), groups_s, samples),
        sum(samples.values()),
        unsplit,
    )


def _profile(profiler: Profiler, served: ServedEngine, options: Sequence[str]) -> Counter[str]:
    """Samples of the event loop's thread by phase, all taken under load."""
    with ThreadPoolExecutor(1) as load_thread:
        idle_s = thread_times_s(served.pid)[served.pid]
        load = load_thread.submit(served.measure, CALLERS, PROFILE_S + 2, *options)
        while not load.done() and thread_times_s(served.pid)[served.pid] < idle_s + LOAD_STARTED_S:
            time.sleep(0.05)
        try:
            stacks = profiler.stacks(PROFILE_S)
        finally:
            load.result()
    return phase_samples(stacks, served.pid)
