"""Command: what a call costs a server in processor time, and which part of the server spends it.

    python -m tests.benchmarks.cost --repo .demo/engines --model lenet5

Total: what the server's process and its children used, user and system, while 16 callers in another
process asked and waited, for each of the calls answered then; nothing watches the server meanwhile.

By phase, in two steps. Each thread's processor time, as /proc tells it during those same runs, is
the engine's where Python did not start the thread, the decoders' or the event loop's. The loop's is
then split by samples of its stack, which py-spy takes in a run of its own: a sample belongs to the
phase whose code is the innermost of the server's. Without py-spy, or where it may not look into the
process, only the loop and all other threads are told apart.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.benchmarks.serving import (
    CALLERS,
    ROOT,
    ServedEngine,
    build_if_missing,
    parser_of,
    served_engine,
)

# In the order of a call's way. `loop` is what the event loop itself spends, and libuv below it.
PHASES = ("loop", "transport", "protobuf", "call", "decode", "queue", "engine", "encode", "metrics")
OTHER = "other threads"
UNSPLIT = "all but the loop"  # where nobody could name the threads

MEANING = {
    "loop": "event loop and libuv: waking, reading sockets, callbacks",
    "transport": "HTTP/2 and gRPC's framing, writing sockets",
    "protobuf": "request parsed, response serialized",
    "call": "clock, limits, finding the model, the coroutine around a call",
    "decode": "pixels out of the message, files decoded and resized",
    "queue": "admission, policy, batches filled",
    "engine": "inference, outputs copied out, the loop woken",
    "encode": "best classes into a response",
    "metrics": "counting",
    OTHER: "what else Python started: HTTP, loading",
    UNSPLIT: "not told apart",
}

# Files below server/, and in them functions, all by how they begin; the first that fits decides.
PHASE_OF: Sequence[tuple[str, str, str]] = (
    ("transport/", "", "transport"),
    ("api/field_limit.py", "", "protobuf"),
    ("api/handlers.py", "_parse", "protobuf"),
    ("api/handlers.py", "", "call"),
    ("models/registry.py", "", "call"),
    ("models/model.py", "", "call"),
    ("models/routing.py", "", "call"),
    ("models/version.py", "", "call"),
    ("errors.py", "", "call"),
    ("images/", "", "decode"),
    ("api/content.py", "", "decode"),
    ("api/classify.py", "_content", "decode"),
    ("api/classify.py", "_image", "decode"),
    ("api/classify.py", "", "encode"),
    ("api/inference.py", "Inference.complete", "metrics"),
    ("api/inference.py", "best_classes", "encode"),
    ("api/inference.py", "", "queue"),
    ("api/", "", "call"),
    ("scheduling/", "", "queue"),
    ("execution/", "", "queue"),
    ("telemetry/loop_lag.py", "", "queue"),
    ("engines/", "", "engine"),
    ("telemetry/metrics.py", "", "metrics"),
    ("telemetry/tracing.py", "", "metrics"),
)
# Functions in C have no frame: the line that calls them tells.
SERIALIZING = "SerializeToString"

SERVER = f"{ROOT / 'server'}/"
FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")
THREAD = re.compile(r"thread \((?P<id>\d+)\)(?:: (?P<name>.*))?$")

RATE_HZ = 200  # of samples
PROFILE_S = 14.0
BUSY_S = 0.05  # of processor time: the load has begun


class Frame(NamedTuple):
    """A function at work: where it stands, and at which of its lines it is."""

    function: str
    file: str
    line: int


class Stack(NamedTuple):
    """What a thread was at when a sample was taken, the innermost frame last, and how often."""

    thread: int
    name: str  # as Python knows it; empty for a thread that Python did not start
    frames: Sequence[Frame]
    samples: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of the server's processor time for a call of one image."""

    model: str
    engine_input: str  # "raw" pixels of the model's size, or "jpeg" files
    calls_hz: list[float]  # a value a round
    total_us: list[float]  # a value a round
    rows: float  # of a batch, the median
    phases_us: dict[str, float]  # of the median total
    samples: int  # of the event loop's thread; 0 where its phases are not known
    unsplit: str  # why they are not known


# --- from samples to phases ------------------------------------------------------------------


def stacks(raw: str) -> list[Stack]:
    """The samples that py-spy wrote, in its format `raw` with threads."""
    found = []
    for line in raw.splitlines():
        text, _, samples = line.rpartition(" ")
        first, *rest = text.split(";")
        if (thread := THREAD.match(first)) is None:
            continue
        frames = [
            Frame(frame["function"], frame["file"], int(frame["line"] or 0))
            for part in rest
            if (frame := FRAME.match(part))
        ]
        found.append(Stack(int(thread["id"]), thread["name"] or "", frames, int(samples)))
    return found


def phase_of(frames: Sequence[Frame]) -> str:
    """What the event loop's thread was at."""
    for frame in reversed(frames):
        if not frame.file.startswith(SERVER):
            continue
        if SERIALIZING in linecache.getline(frame.file, frame.line):
            return "protobuf"
        return phase_of_code(frame.file.removeprefix(SERVER), frame.function)
    return "loop"


def phase_of_code(file: str, function: str = "") -> str:
    """Of a function in a file below server/."""
    for beginning, name, phase in PHASE_OF:
        if file.startswith(beginning) and function.startswith(name):
            return phase
    return "loop"


def phase_samples(found: Iterable[Stack], thread: int) -> Counter[str]:
    """How many samples of a thread are of which phase."""
    counts: Counter[str] = Counter()
    for stack in found:
        if stack.thread == thread:
            counts[phase_of(stack.frames)] += stack.samples
    return counts


def group_of(thread: int, name: str, loop: int) -> str:
    """What a thread is there for: `loop` is the thread of the event loop."""
    if thread == loop:
        return "loop"
    if not name:
        return "engine"
    return "decode" if name.startswith("decode") else OTHER


def split(
    total_us: float, groups_s: Mapping[str, float], samples: Mapping[str, int]
) -> dict[str, float]:
    """Microseconds of a call by phase, from the seconds of each group of threads and the samples of
    the loop's; together they are the total."""
    seconds = sum(groups_s.values())
    us = {group: total_us * spent_s / seconds for group, spent_s in groups_s.items()}
    if taken := sum(samples.values()):
        loop_us = us.pop("loop", 0.0)
        for phase, count in samples.items():
            us[phase] = us.get(phase, 0.0) + loop_us * count / taken
    order = (*PHASES, OTHER, UNSPLIT)
    return {phase: us[phase] for phase in order if us.get(phase)}


# --- threads, and what they are ---------------------------------------------------------------


def threads_s(pid: int) -> dict[int, float]:
    """Processor seconds, user and system, of each thread of a process and of its children's."""
    waiting, found, tick_s = [pid], dict[int, float](), 1 / os.sysconf("SC_CLK_TCK")
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                waiting += map(int, (task / "children").read_text().split())
            except OSError:  # it has ended meanwhile
                continue
            found[int(task.name)] = (int(fields[11]) + int(fields[12])) * tick_s
    return found


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> Counter[int]:
    """Seconds of each thread between two readings."""
    return Counter({thread: now - before.get(thread, 0.0) for thread, now in after.items()})


class ProfilerMissing(Exception):
    """py-spy is not there, or may not look; the message says which."""


class Profiler:
    """py-spy, looking at one process from outside."""

    def __init__(self, pid: int) -> None:
        beside = Path(sys.executable).parent / "py-spy"
        command = str(beside) if beside.exists() else shutil.which("py-spy")
        if command is None:
            raise ProfilerMissing("py-spy is not installed")
        self._command, self._pid = command, pid

    def names(self) -> dict[int, str]:
        """The process's threads that run Python, by the system's number of each."""
        listed = json.loads(self._run("dump", "--json"))
        return {one["os_thread_id"]: one["thread_name"] or "" for one in listed}

    def stacks(self, seconds: float) -> list[Stack]:
        """Samples of all threads that are at work, for so many seconds from now on."""
        with tempfile.TemporaryDirectory(prefix="bench-cost-") as folder:
            raw = Path(folder) / "raw"
            self._run(
                *("record", "--format", "raw", "--threads", "--full-filenames"),
                *("--rate", str(RATE_HZ), "--duration", f"{seconds:.0f}", "--output", str(raw)),
            )
            return stacks(raw.read_text())

    def _run(self, subcommand: str, *options: str) -> str:
        command = [self._command, subcommand, "--pid", str(self._pid), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ProfilerMissing(f"py-spy failed: {said[0] if said else done.returncode}")
        return done.stdout


# --- the measurement --------------------------------------------------------------------------


def measure(
    repo: Path, model: str, engine_input: str, rounds: int, seconds: float, console: Console
) -> Cost:
    """Builds the model where it is missing, serves it, and measures."""
    build_if_missing(repo, model, console)
    console.print(f"loading {model}, to be asked with {engine_input} images")
    calls_hz, total_us, rows = [], [], []
    by_thread: Counter[int] = Counter()
    with served_engine(repo, model) as served:
        options = ("--input", engine_input, "--server-pid", str(served.pid))
        for number in range(1, rounds + 1):
            before = threads_s(served.pid)
            report = served.measure(CALLERS, seconds, *options)
            by_thread += spent(before, threads_s(served.pid))
            calls_hz.append(report["calls_hz"])
            total_us.append(report["server_cpu_s_per_call"] * 1e6)
            rows.append(report["server_mean_batch_rows"])
            console.print(
                f"  {model}, {engine_input}, round {number} of {rounds}: {total_us[-1]:,.0f} us "
                f"a call, {calls_hz[-1]:,.1f} calls/s"
            )
        samples, names, unsplit = Counter[str](), dict[int, str](), ""
        try:
            profiler = Profiler(served.pid)
            names = profiler.names()  # first: where it may not look, this says so at once
            samples = _profile(profiler, served, options)
        except ProfilerMissing as error:
            unsplit = str(error)
            console.print(f"  not split by phase: {unsplit}")
        groups_s: Counter[str] = Counter()
        for thread, used_s in by_thread.items():
            group = group_of(thread, names.get(thread, ""), served.pid)
            groups_s[group if group == "loop" or not unsplit else UNSPLIT] += used_s
    return Cost(
        model,
        engine_input,
        calls_hz,
        total_us,
        median(rows),
        split(median(total_us), groups_s, samples),
        sum(samples.values()),
        unsplit,
    )


def _profile(profiler: Profiler, served: ServedEngine, options: Sequence[str]) -> Counter[str]:
    """Samples of the loop's thread by phase, all taken under load."""
    with ThreadPoolExecutor(1) as caller:
        idle_s = threads_s(served.pid)[served.pid]
        loading = caller.submit(served.measure, CALLERS, PROFILE_S + 2, *options)
        while not loading.done() and threads_s(served.pid)[served.pid] < idle_s + BUSY_S:
            time.sleep(0.05)
        try:
            found = profiler.stacks(PROFILE_S)
        finally:
            loading.result()
    return phase_samples(found, served.pid)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, rounds=3, seconds=4.0)
    add = parser.add_argument
    add("--input", default="raw", choices=("raw", "jpeg"), help="what is sent (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    repo = args.repo.resolve()
    cost = measure(repo, args.model, args.input, args.rounds, args.seconds, console)
    console.print(_table(cost))
    if args.json:
        args.json.write_text(json.dumps(asdict(cost), indent=2) + "\n")
    return 0


def _table(cost: Cost) -> Table:
    total_us = median(cost.total_us)
    title = f"{cost.model}, {cost.engine_input}, {median(cost.calls_hz):,.1f} calls a second"
    table = Table(title=title, title_justify="left")
    table.add_column("phase")
    table.add_column("us a call", justify="right")
    table.add_column("share", justify="right")
    for phase, us in cost.phases_us.items():
        table.add_row(phase, f"{us:,.1f}", f"{us / total_us:.1%}")
    table.add_section()
    table.add_row("all", f"{total_us:,.1f}", f"{cost.samples:,} samples")
    return table


if __name__ == "__main__":
    sys.exit(main())
