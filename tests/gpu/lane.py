"""Command: checks and measures the engines on this machine's GPU, in less than nine minutes.

    python -m tests.gpu.lane --out DIR [--wheels DIR] [--models resnet50,...] [--minutes 8]

Prints the machine; finds which TensorRT runs here, else takes inductor; holds every network against
eager PyTorch in float32 at every size of a CUDA graph; measures latency and throughput by batch
size beside torch eager and torch.compile, the bus, and the server with clients in several
processes. Writes results.json and results.md. What there is no time left for is listed, not
guessed. Without a GPU it compiles every network, says so, and ends with 0.

Packages that are missing or older, and TensorRT-RTX in one or several versions, are taken from
wheels in the folder --wheels: they are unpacked into --scratch, nothing is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# In this order: 1.6.1 has been seen to run on a GPU that it does not list, 1.7.1 may refuse to.
RTX = ("1.6.1.120", "1.5.0.114", "1.7.1.116")
PROBE_S = 60.0
PROBES_S = 90.0  # for all of them
ATTEMPTS = 4  # at measuring, in as many processes
GRACE_S = 60.0  # for what was begun in time; then the lane ends, with what has been written


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all that was run gave right answers, 1 when not; wrong usage exits with 2."""
    ends_s = time.monotonic()
    parser = parser_of("tests.gpu.lane", __doc__)
    given = parser.parse_args(arguments)
    ends_s += 60 * given.minutes
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if given.scratch:
            scratch = given.scratch.resolve()
            scratch.mkdir(parents=True, exist_ok=True)
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-lane-")))
        folders = ["--out", str(out), "--scratch", str(scratch)]
        packages = scratch / "packages"
        versions = _unpack(given.wheels, packages) if given.wheels else {}
        path = [str(ROOT), str(packages)]
        backend = given.backend
        tried: list[dict[str, Any]] = []
        if backend in ("auto", "tensorrt"):
            probes_end_s = min(ends_s, time.monotonic() + PROBES_S)

            def probe(path: Sequence[str]) -> str:
                left_s = min(PROBE_S, probes_end_s - time.monotonic())
                return _probe(folders, _environment(path, scratch), left_s)

            path, tried = _choose(path, versions, _has_tensorrt(packages), probe)
            if any(each["runs"] for each in tried):
                backend = "tensorrt"
        command = [sys.executable, "-m", "tests.gpu.measure"]
        command += sys.argv[1:] if arguments is None else arguments
        command += [*folders, "--tried", json.dumps(tried), "--command", _command(parser, given)]

        def measure(backend: str, more: Sequence[str]) -> int | None:
            left_s = max(0.0, ends_s - time.monotonic())
            options = ["--backend", backend, "--minutes", f"{left_s / 60:.2f}", *more]
            environment = _environment(path, scratch)
            try:
                return _run([*command, *options], environment, left_s + GRACE_S).returncode
            except subprocess.TimeoutExpired:
                print(f"stopped: something did not end within {GRACE_S:.0f} s", flush=True)
                return None

        return _through(backend, out / "results.json", measure)


def _through(
    backend: str, results: Path, measure: Callable[[str, Sequence[str]], int | None]
) -> int:
    """Measures to the end. After a crash it goes on behind what crashed; where TensorRT gets no
    figure of the first model, with inductor."""
    more: list[str] = []
    for _ in range(ATTEMPTS):
        code = measure(backend, more)
        if code is None or code == 2:
            break
        measured = _first_is_measured(results)
        if code in (0, 1) and (measured or backend != "tensorrt"):
            return code
        if code not in (0, 1):
            print(f"the measuring process ended with {code}", flush=True)
        if backend == "tensorrt" and not measured:
            backend = "inductor"
        more = ["--resume"]
    return 2 if code == 2 else 1


def _first_is_measured(results: Path) -> bool:
    """Whether there are figures of the model that comes first."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError):
        return False
    return any(
        one.get("speed") for key, one in found["models"].items() if key.split()[0] == found["first"]
    )


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options of the lane, which both of its processes know."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, two files")
    parser.add_argument("--scratch", type=Path, help="for engines and packages; else it is removed")
    parser.add_argument("--wheels", type=Path, help="folder of wheels")
    parser.add_argument("--models", default="", help="with commas; else all, the usual ones first")
    parser.add_argument(
        "--precisions", default="", help="with commas; else fp16,bf16; of inductor bf16"
    )
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, inductor or openvino")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so many")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=990.0,
        help="of the GPU in half precision, dense, for the roofline (H200: %(default)s)",
    )
    return parser


def _command(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """What was asked for, but for the names of this machine's folders."""
    words = ["python -m tests.gpu.lane"]
    for name, value in vars(given).items():
        if value != parser.get_default(name):
            shown = "DIR" if isinstance(value, Path) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def _run(
    command: Sequence[str], environment: dict[str, str], limit_s: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Like subprocess.run, but what the command has started ends with it."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True, **options
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _environment(path: Sequence[str], scratch: Path) -> dict[str, str]:
    """Where Python finds packages, and a C++ compiler what inductor's code includes and links."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if (
        driver := _driver()
    ) is not None:  # often there as libcuda.so.1 alone, without a linker's name
        links = scratch / "lib"
        links.mkdir(exist_ok=True)
        (links / "libcuda.so").unlink(missing_ok=True)
        (links / "libcuda.so").symlink_to(driver)
        others = os.environ.get("LIBRARY_PATH")
        found["LIBRARY_PATH"] = os.pathsep.join([str(links), *([others] if others else [])])
    if (toolkit := _toolkit()) is not None:
        found["CUDA_HOME"] = str(toolkit)
    return found


def _driver() -> Path | None:
    """The file of libcuda that programs here are linked to."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    mapped = re.search(r"\S*/libcuda\.so\S*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return Path(mapped[0]) if mapped else None


def _toolkit() -> Path | None:
    """CUDA's headers as torch's own packages bring them, where torch would find no others."""
    known = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    spec = util.find_spec("nvidia")
    if known or Path("/usr/local/cuda").exists() or spec is None:
        return None
    for place in spec.submodule_search_locations or ():
        for header in sorted(Path(place).glob("cu*/include/cuda.h"), reverse=True):
            return header.parent.parent
    return None


def _choose(
    path: list[str], versions: dict[str, Path], installed: bool, probe: Callable[[list[str]], str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Where Python finds the first TensorRT that runs here, and what became of all that were tried.

    Where none runs, the first that there is: it compiles without a GPU.
    """
    tried: list[dict[str, Any]] = []
    found = [path] if installed else []
    for name, folder in {"installed": None, **versions}.items():
        candidate = [str(folder), *path] if folder else path
        why = probe(candidate) if folder or installed else "there is none"
        tried.append({"tensorrt": name, "runs": not why, "why": why})
        print(f"TensorRT {name}: {why or 'runs'}", flush=True)
        if not why:
            return candidate, tried
        if folder:
            found.append(candidate)
    return (found or [path])[0], tried


def _has_tensorrt(packages: Path) -> bool:
    names = ("tensorrt", "tensorrt_rtx_bindings")
    return any(util.find_spec(name) or (packages / name).is_dir() for name in names)


def _probe(folders: Sequence[str], environment: dict[str, str], limit_s: float) -> str:
    """Why TensorRT found there does not run ResNet-18 here; empty where it does.

    In a process of its own: what crashes there does not end the lane.
    """
    if limit_s <= 0:
        return "no time was left to try it"
    command = [sys.executable, "-m", "tests.gpu.measure", "--probe", *folders]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done = _run(command, environment, limit_s, **pipes)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_s:.0f} s"
    return _reason(done)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == 0:
        return ""
    told = done.stdout.strip().splitlines()
    if done.returncode == 1 and told:
        return told[-1]
    return " ".join([f"the process ended with {done.returncode}", *done.stderr.splitlines()[-1:]])


def _unpack(wheels: Path, packages: Path) -> dict[str, Path]:
    """Unpacks what is not installed, or older; gives TensorRT-RTX's folders by version, in order to
    try."""
    found: dict[str, Path] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_, python, interface, machine = wheel.stem.split("-")
        if not _fits(python, interface, machine):
            continue
        if name.startswith("tensorrt_rtx"):
            folder = found[version] = packages.parent / f"tensorrt-rtx-{version}"
        elif _installed(name) >= _numbers(version):
            continue
        else:
            folder = packages
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return {version: found[version] for version in (*RTX, *sorted(found)) if version in found}


def _fits(python: str, interface: str, machine: str) -> bool:
    """Whether a wheel of these tags is for this Python and this kind of machine."""
    ours = f"cp3{sys.version_info.minor}"
    stable = interface == "abi3" and python.startswith("cp3")
    here = machine == "any" or machine.endswith(platform.machine())
    return here and (stable or bool({"py3", ours} & set(python.split("."))))


def _installed(name: str) -> tuple[int, ...]:
    """The version of a package that is installed; empty where it is not."""
    try:
        return _numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


if __name__ == "__main__":
    sys.exit(main())
