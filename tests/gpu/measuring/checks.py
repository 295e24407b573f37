"""Checks an engine on this GPU: its answers, the engine interface, and damaged plans."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from server.engines import golden_check as golden
from server.engines.base import Engine, Outputs, backend, infer
from server.engines.tensorrt.cuda import Cuda
from server.errors import EngineFailure
from server.repository import reader
from server.repository.contents import VersionEntry
from tests.gpu.measuring.report import Results

DAMAGED_LOADS = 200
DAMAGED_LOADS_S = 40.0  # start no further load after this time


def check_deviation(engine: Engine, version: VersionEntry) -> dict[str, float]:
    """Runs the golden check at every batch size that the engine computes.

    Returns the largest deviation by batch size. Raises GoldenMismatch.
    """
    assert version.manifest is not None
    expected = reader.read_golden(version.folder, version.manifest)
    sizes = sorted({engine.computed_rows(rows) for rows in range(1, engine.max_batch + 1)})
    precision = version.manifest.engines[-1].precision
    return golden.check(engine, expected, precision, sizes)


def check_interface(engine: Engine, version: VersionEntry) -> None:
    """Checks the promises of server.engines.base. Raises AssertionError.

    These are the types of the outputs, outputs that the caller may keep, and instances that run
    side by side.
    """
    assert version.manifest is not None
    pixels = reader.read_golden(version.folder, version.manifest).pixels
    first = engine.instances[0]
    for rows in range(1, min(len(pixels), engine.max_batch) + 1):
        answer = infer(first, pixels[:rows])
        types = [(array.shape[0], array.dtype.name) for array in answer]
        assert types == [(rows, "int32"), (rows, "float32"), (rows, "float32")], types
    kept = [array.copy() for array in answer]
    infer(first, pixels[::-1][:1])
    assert all(map(np.array_equal, answer, kept)), "a later batch changed earlier outputs"
    alone = [infer(first, pixels[n : n + 1]).classes[0, 0] for n in range(len(pixels))]
    for _ in range(20):
        finished: list[SimpleQueue[Outputs | Exception]] = []
        for n, instance in enumerate(engine.instances):
            instance.pixels[:1] = pixels[n : n + 1]
            finished.append(SimpleQueue())
            instance.start(1, finished[-1].put)
        for n, queue in enumerate(finished):
            outcome = queue.get()
            assert isinstance(outcome, Outputs), outcome
            assert outcome.classes[0, 0] == alone[n], "an instance disturbs another"
            assert queue.empty(), "on_done was called twice"


def check_damaged_plans(out: Path, scratch: Path, name: str) -> Results:
    """Runs `load_damaged_plans` in a process of its own, because such a load may crash."""
    command = [sys.executable, "-m", "tests.gpu.measure", "--damaged-plans", name]
    command += ["--out", str(out), "--scratch", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * DAMAGED_LOADS_S)
    if done.returncode:
        raise EngineFailure(f"the process ended with {done.returncode}: {done.stderr[-1000:]}")
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found


def damaged_copies(plan: bytes) -> dict[str, bytes]:
    """Copies of a plan with damage that TensorRT does not notice at the beginning."""
    third = len(plan) // 3
    return {
        "the end is missing": plan[: 2 * third],
        "a hole in the middle": plan[:third] + bytes(third) + plan[2 * third :],
    }


def load_damaged_plans(folder: Path, version: VersionEntry) -> Results:
    """Loads damaged plans many times. Counts loads, rejections, and lost bytes of device memory.

    A plan has no checksum, so TensorRT may accept one with a hole. Servers compare the hash first.
    """
    assert version.manifest is not None
    record = version.manifest.engines[-1]
    shape = version.manifest.input.spec().shape
    file = record.files[0].name
    plan = (version.folder / file).read_bytes()
    for number, content in enumerate(damaged_copies(plan).values()):
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        (folder / str(number) / file).write_bytes(content)
    folders = sorted(folder.iterdir())
    cuda = Cuda()
    before = loads = rejected = 0
    ends_s = time.monotonic() + DAMAGED_LOADS_S
    while loads < DAMAGED_LOADS and time.monotonic() < ends_s:
        try:
            each = folders[loads % len(folders)]
            backend(record.backend).load(each, record, shape, threads=1).close()
        except EngineFailure:
            rejected += 1
        loads += 1
        gc.collect()
        if loads == 2 * len(folders):  # by now, everything that is created once exists
            before = cuda.gpu().free_bytes
    return {"loads": loads, "rejected": rejected, "lost_bytes": before - cuda.gpu().free_bytes}
