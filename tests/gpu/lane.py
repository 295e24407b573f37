"""Checks and measures the engines on this machine's GPU, in less than nine minutes.

    python -m tests.gpu.lane --out DIR [--wheels DIR] [--models resnet50,...] [--minutes 8]

It finds a TensorRT that runs here, or else uses inductor. It compares every network with eager
float32 PyTorch, at each batch size that has a CUDA graph. It measures latency and throughput by
batch size, beside eager PyTorch and torch.compile. It also measures the bus, and the server with
clients in several processes. It writes results.json and results.md, and lists skipped steps if the
time is up. Without a GPU it only compiles every network, and exits with 0.

Packages that are missing or older here are unpacked from the wheels in --wheels to --scratch;
nothing is installed. There may be several versions of TensorRT-RTX.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import util
from pathlib import Path
from typing import Any

from tests.gpu.environment import environment
from tests.gpu.options import lane_parser
from tests.gpu.wheels import unpack_wheels

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE_S = 60.0  # for one TensorRT
ALL_PROBES_S = 90.0
MAX_PROCESSES = 4  # that measure, one after another
GRACE_S = 60.0  # for the last step to finish after the time is up


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all results are right, 1 if some step failed, 2 for wrong usage."""
    ends_s = time.monotonic()
    parser = lane_parser("tests.gpu.lane", __doc__)
    options = parser.parse_args(arguments)
    ends_s += 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if options.scratch:
            scratch = options.scratch.resolve()
            scratch.mkdir(parents=True, exist_ok=True)
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-lane-")))
        folders = ["--out", str(out), "--scratch", str(scratch)]
        backend, path, tried = _find_tensorrt(options, folders, scratch, ends_s)
        command = [sys.executable, "-m", "tests.gpu.measure"]
        command += sys.argv[1:] if arguments is None else arguments
        command += [*folders, "--tried", json.dumps(tried)]
        command += ["--command", _portable_command(parser, options)]

        def measure(backend: str, more: Sequence[str]) -> int | None:
            left_s = max(0.0, ends_s - time.monotonic())
            time_limit = ["--backend", backend, "--minutes", f"{left_s / 60:.2f}", *more]
            variables = environment(path, scratch)
            try:
                return _run([*command, *time_limit], variables, left_s + GRACE_S).returncode
            except subprocess.TimeoutExpired:
                print(f"stopped: a step did not finish within {GRACE_S:.0f} s", flush=True)
                return None

        return _measure_until_done(backend, out / "results.json", measure)


def _find_tensorrt(
    options: argparse.Namespace, folders: Sequence[str], scratch: Path, ends_s: float
) -> tuple[str, list[str], list[dict[str, Any]]]:
    """The backend, the Python path, and the TensorRT libraries that were probed."""
    packages = scratch / "packages"
    versions = unpack_wheels(options.wheels, packages) if options.wheels else {}
    path = [str(ROOT), str(packages)]
    if options.backend not in ("auto", "tensorrt"):
        return options.backend, path, []
    probes_end_s = min(ends_s, time.monotonic() + ALL_PROBES_S)

    def probe(path: Sequence[str]) -> str:
        limit_s = min(PROBE_S, probes_end_s - time.monotonic())
        return _probe(folders, environment(path, scratch), limit_s)

    path, tried = _choose_tensorrt(path, versions, _has_tensorrt(packages), probe)
    runs = any(each["runs"] for each in tried)
    return "tensorrt" if runs else options.backend, path, tried


def _choose_tensorrt(
    path: list[str], versions: dict[str, Path], installed: bool, probe: Callable[[list[str]], str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The Python path of the first TensorRT that runs here, and the result of each probe.

    If none runs, the path of the first one that exists, because it compiles without a GPU.
    """
    tried: list[dict[str, Any]] = []
    existing = [path] if installed else []
    for name, folder in {"installed": None, **versions}.items():
        candidate = [str(folder), *path] if folder else path
        reason = probe(candidate) if folder or installed else "not installed"
        tried.append({"tensorrt": name, "runs": not reason, "reason": reason})
        print(f"TensorRT {name}: {reason or 'runs'}", flush=True)
        if not reason:
            return candidate, tried
        if folder:
            existing.append(candidate)
    return (existing or [path])[0], tried


def _has_tensorrt(packages: Path) -> bool:
    names = ("tensorrt", "tensorrt_rtx_bindings")
    return any(util.find_spec(name) or (packages / name).is_dir() for name in names)


def _probe(folders: Sequence[str], variables: dict[str, str], limit_s: float) -> str:
    """Why TensorRT does not run ResNet-18 in this environment; empty if it does.

    It runs in a process of its own, so that a crash does not end the lane.
    """
    if limit_s <= 0:
        return "not tried, the time was up"
    command = [sys.executable, "-m", "tests.gpu.measure", "--probe", *folders]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done = _run(command, variables, limit_s, **pipes)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_s:.0f} s"
    return _failure_reason(done)


def _failure_reason(done: subprocess.CompletedProcess[str]) -> str:
    """The probe's last line of output, or how its process ended; empty on success."""
    if done.returncode == 0:
        return ""
    lines = done.stdout.strip().splitlines()
    if done.returncode == 1 and lines:
        return lines[-1]
    return " ".join([f"the process ended with {done.returncode}", *done.stderr.splitlines()[-1:]])


def _measure_until_done(
    backend: str, results: Path, measure: Callable[[str, Sequence[str]], int | None]
) -> int:
    """Starts measuring processes until one finishes, and returns the exit status.

    After a crash, the next process continues after the step that crashed. If TensorRT gets no
    results for the first model, the next process uses inductor.
    """
    more: list[str] = []
    for _ in range(MAX_PROCESSES):
        code = measure(backend, more)
        if code is None or code == 2:
            break
        measured = _has_first_model(results)
        if code in (0, 1) and (measured or backend != "tensorrt"):
            return code
        if code not in (0, 1):
            print(f"the measuring process ended with {code}", flush=True)
        if backend == "tensorrt" and not measured:
            backend = "inductor"
        more = ["--resume"]
    return 2 if code == 2 else 1


def _has_first_model(results: Path) -> bool:
    """Whether there are results for the first model."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError):
        return False
    return any(
        model.get("speed")
        for key, model in found["models"].items()
        if key.split()[0] == found["first_model"]
    )


def _portable_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command line for the report, without the names of local folders."""
    words = ["python -m tests.gpu.lane"]
    for name, value in vars(options).items():
        if value != parser.get_default(name):
            shown = "DIR" if isinstance(value, Path) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def _run(
    command: Sequence[str], variables: dict[str, str], limit_s: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run, but a timeout also kills the processes that the command started."""
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, start_new_session=True, **options
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


if __name__ == "__main__":
    sys.exit(main())
