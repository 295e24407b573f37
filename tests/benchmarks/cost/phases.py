"""Phases of a request, and the code and threads of the server that belong to each."""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.cost.sampling import Frame, Stack

# In the order of a request's path.
PHASES = ("loop", "transport", "protobuf", "call", "decode", "queue", "engine", "encode", "metrics")
OTHER = "other threads"
UNSPLIT = "all but the loop"  # if the names of the threads are unknown

MEANING = {
    "loop": "event loop and libuv: wake-ups, socket reads, callbacks",
    "transport": "HTTP/2 and gRPC framing, socket writes",
    "protobuf": "parsing the request, serializing the response",
    "call": "deadline, limits, routing to a model, the coroutine of the call",
    "decode": "reading pixels from the message, decoding and resizing files",
    "queue": "admission, scheduling, filling batches",
    "engine": "inference, copying the outputs, waking the event loop",
    "encode": "writing the top classes into the response",
    "metrics": "counters and histograms",
    OTHER: "all other Python threads: HTTP, loading models",
    UNSPLIT: "not split by phase",
}

# Prefixes of files below server/ and of functions in them. The first match decides.
PHASE_OF: Sequence[tuple[str, str, str]] = (
    ("transport/", "", "transport"),
    ("api/rpc/field_limit.py", "", "protobuf"),
    ("api/rpc/handlers.py", "_parse", "protobuf"),
    ("api/rpc/handlers.py", "", "call"),
    ("models/registry.py", "", "call"),
    ("models/model.py", "", "call"),
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
    ("security/fair_limit.py", "", "queue"),
    ("security/quota.py", "", "queue"),
    ("security/", "", "call"),
    ("scheduling/", "", "queue"),
    ("execution/", "", "queue"),
    ("telemetry/loop_lag.py", "", "queue"),
    ("engines/", "", "engine"),
    ("telemetry/metrics.py", "", "metrics"),
    ("telemetry/tracing.py", "", "metrics"),
)
# Functions in C have no frame. So a line that calls this one belongs to protobuf.
SERIALIZING = "SerializeToString"

SERVER = f"{Path(__file__).resolve().parent.parent.parent.parent / 'server'}/"


def phase_of(frames: Sequence[Frame]) -> str:
    """The phase of a sample of the event loop's thread.

    The innermost function of the server decides. Code outside the server belongs to its caller.
    """
    for frame in reversed(frames):
        if not frame.file.startswith(SERVER):
            continue
        if SERIALIZING in linecache.getline(frame.file, frame.line):
            return "protobuf"
        return phase_of_code(frame.file.removeprefix(SERVER), frame.function)
    return "loop"


def phase_of_code(file: str, function: str = "") -> str:
    """The phase of a function in a file below server/."""
    for prefix, name, phase in PHASE_OF:
        if file.startswith(prefix) and function.startswith(name):
            return phase
    return "loop"


def phase_samples(stacks: Iterable[Stack], thread: int) -> Counter[str]:
    """Counts the samples of a thread by phase."""
    counts: Counter[str] = Counter()
    for stack in stacks:
        if stack.thread == thread:
            counts[phase_of(stack.frames)] += stack.samples
    return counts


def thread_group(thread: int, name: str, loop: int) -> str:
    """The phase of a whole thread, or OTHER. `loop` is the thread of the event loop."""
    if thread == loop:
        return "loop"
    if not name:
        return "engine"
    return "decode" if name.startswith("decode") else OTHER


def split_by_phase(
    total_us: float, groups_s: Mapping[str, float], samples: Mapping[str, int]
) -> dict[str, float]:
    """Splits the microseconds of a request by phase; the sum of the phases is the total.

    `groups_s` has the seconds of each thread group, `samples` the event loop's samples by phase.
    """
    seconds = sum(groups_s.values())
    us = {group: total_us * spent_s / seconds for group, spent_s in groups_s.items()}
    if taken := sum(samples.values()):
        loop_us = us.pop("loop", 0.0)
        for phase, count in samples.items():
            us[phase] = us.get(phase, 0.0) + loop_us * count / taken
    order = (*PHASES, OTHER, UNSPLIT)
    return {phase: us[phase] for phase in order if us.get(phase)}
