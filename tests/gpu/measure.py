"""Checks and measures engines. tests/gpu/lane.py starts this in a process that finds TensorRT."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

import torch

from model_repo import cards
from server.engines.base import backend
from tests.benchmarks.targets.bare import newest_version
from tests.gpu.measuring.checks import (
    check_damaged_plans,
    check_deviation,
    check_interface,
    load_damaged_plans,
)
from tests.gpu.measuring.engines import build_engine, compile_plan, newest_engine, probe_tensorrt
from tests.gpu.measuring.machine import measure_copies
from tests.gpu.measuring.measurement_run import MeasurementRun
from tests.gpu.measuring.report import report
from tests.gpu.measuring.speed import BATCHES, measure_engine, measure_pytorch, measure_server
from tests.gpu.options import lane_parser

ORDER = ("resnet50", "vgg16", "googlenet", "resnet152", "alexnet", "lenet5")  # then all others
FIRST_MODELS = 2  # these are measured in every precision before the other models
COMPILED = ("resnet50", "vgg16")  # also measured with torch.compile, which is slow,
COMPILED_FIRST = (1, 256)  # at these batch sizes first


def measure_all(run: MeasurementRun, names: Sequence[str], precisions: Sequence[str]) -> None:
    """The most important results come first.

    The order is: engines of the first models, the server, PyTorch, then the other models.
    """
    on_gpu = run.results["machine"]["gpu"] is not None
    run.results["first_model"] = names[0]
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        run.result_step("copies", "copies", measure_copies)
    first, others = names[:FIRST_MODELS], names[FIRST_MODELS:]
    compiled = [name for name in first if name in COMPILED]
    for name in first:
        for precision in precisions:
            measure_model(run, name, precision)
    run.result_step("served", "served", partial(measure_server, run, names[0]))
    if on_gpu:
        for name in first:
            compare_pytorch(run, name, precisions[-1], BATCHES, compiled=False)
        for name in compiled:
            compare_pytorch(run, name, precisions[-1], COMPILED_FIRST, compiled=True)
        if run.backend == "tensorrt":
            check = partial(check_damaged_plans, run.out, run.scratch, names[0])
            run.result_step("damaged_plans", "damaged plans", check)
    for name in others:
        measure_model(run, name, precisions[0])
        if on_gpu:
            compare_pytorch(run, name, precisions[0], BATCHES, compiled=False)
    if on_gpu:
        remaining = [batch for batch in BATCHES if batch not in COMPILED_FIRST]
        for name in compiled:
            compare_pytorch(run, name, precisions[-1], remaining, compiled=True)
    for name in others:
        for precision in precisions[1:]:
            measure_model(run, name, precision)


def measure_model(run: MeasurementRun, name: str, precision: str) -> None:
    """Builds, checks and times one engine, unless an earlier process did so."""
    found = run.results["models"].setdefault(f"{name} {precision}", {})
    if found.get("speed"):
        return
    build = partial(build_engine, run.repo, run.backend, name, precision)
    found["build"] = run.step(f"{name} {precision} built", build)
    if found["build"] is None:
        return

    def check_and_time() -> None:
        with newest_engine(run.repo, name) as (engine, version):
            found["deviation"] = check_deviation(engine, version)
            check_interface(engine, version)
            found["captured"] = getattr(engine.instances[0], "captured", None)
            measure_engine(run, engine, name, found.setdefault("speed", []))

    run.step(f"{name} {precision} checked and timed", check_and_time)


def compare_pytorch(
    run: MeasurementRun, name: str, precision: str, batches: Sequence[int], *, compiled: bool
) -> None:
    """Times PyTorch at the batch sizes that have no result yet."""
    how = "torch.compile" if compiled else "eager"
    rows = run.results["models"].setdefault(f"{name} {precision}", {}).setdefault(how, [])
    remaining = [batch for batch in batches if batch not in {row["batch"] for row in rows}]
    if remaining:
        step = f"{name} {how} {' '.join(map(str, remaining))}"
        work = partial(measure_pytorch, run, name, precision, rows, remaining, compiled=compiled)
        run.step(step, work)


def compile_all(run: MeasurementRun, names: Sequence[str]) -> None:
    """Compiles every network, for machines without a GPU."""
    plans = run.results["plans"] = {}
    for name in names:
        work = partial(compile_plan, run.scratch / "plans" / name, name)
        if (found := run.step(f"{name} fp16 compiled", work)) is not None:
            plans[name] = found


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the names of the models to measure."""
    parser = lane_parser("tests.gpu.measure", __doc__)
    parser.add_argument("--probe", action="store_true", help="only run ResNet-18 by TensorRT")
    parser.add_argument("--damaged-plans", metavar="MODEL", help="only load damaged plans")
    parser.add_argument("--command", default="python -m tests.gpu.measure", help="for the report")
    parser.add_argument("--resume", action="store_true", help="continue after a crashed process")
    parser.add_argument("--tried", default="[]", help="the probed TensorRT libraries, as JSON")
    options = parser.parse_args(arguments)
    options.scratch = options.scratch or options.out / "scratch"
    known = [*ORDER, *(name for name in cards.names() if name not in ORDER)]
    names = options.models.split(",") if options.models else known
    if unknown := [name for name in names if name not in known]:
        parser.error(
            f"--models: unknown model {', '.join(unknown)}; choose from {', '.join(known)}"
        )
    return options, names


def choose_backend(run: MeasurementRun) -> str:
    """TensorRT if one of the probed libraries runs, else inductor on a GPU, else "none"."""
    if run.backend not in ("auto", "tensorrt", "none"):
        return run.backend
    if any(tried["runs"] for tried in run.results["tried"]):
        return "tensorrt"
    return "inductor" if run.results["machine"]["gpu"] is not None else "none"


def main(arguments: Sequence[str] | None = None) -> int:
    options, names = parse(arguments)
    if options.probe:
        try:
            probe_tensorrt(options.scratch / "probe")
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "))
            return 1
        return 0
    if options.damaged_plans:
        version = newest_version(options.scratch / "engines", options.damaged_plans)
        print(json.dumps(load_damaged_plans(options.scratch / "damaged", version)))
        return 0
    run = MeasurementRun(options)
    run.backend = choose_backend(run)
    if run.backend == "none":
        without = f"no GPU: {run.results['machine']['why_no_gpu']}"
        try:
            backend("tensorrt").version()
        except ImportError as error:
            print(f"{without}; TensorRT can't compile either: {error}", flush=True)
        else:
            print(f"{without}; compiling only", flush=True)
            compile_all(run, names)
    else:
        default = "bf16" if run.backend == "inductor" else "fp16,bf16"
        measure_all(run, names, (options.precisions or default).split(","))
    run.save()
    print(report(run.results))
    return 1 if run.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
