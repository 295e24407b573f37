"""Compiles an exported network into an engine and compares it with eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from model_repo.progress import BuildProgress
from server.engines import golden_check
from server.engines.base import Backend, CompileOptions, Engine, backend, infer
from server.engines.record import engine_record
from server.images.input_spec import Pixels
from server.process.cores import available_cores
from server.repository.manifest import EngineRecord
from server.repository.reader import Golden

GPU_BACKENDS = {"tensorrt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """One engine to compile: from `onnx` into the folder `staged`."""

    backend: str
    options: CompileOptions  # without a precision
    onnx: Path
    staged: Path
    shape: tuple[int, int, int]  # H, W, C
    progress: BuildProgress


def compile_engine(
    job: CompileJob, precisions: Sequence[str], golden: Golden
) -> tuple[EngineRecord, Golden]:
    """Compiles for the first of the precisions whose engine matches `golden`.

    `golden` holds the outputs of eager PyTorch. Also returns the outputs that the engine was
    compared with: the null backend replaces them by its own. Raises GoldenMismatch if no precision
    is accurate enough.
    """
    *others, last = precisions
    for precision in others:
        try:
            return _compile_and_check(job, precision, golden)
        except golden_check.GoldenMismatch as error:
            job.progress.warn(
                f"{precision} is not accurate enough for this network, using {last}: {error}"
            )
    return _compile_and_check(job, last, golden)


def _compile_and_check(
    job: CompileJob, precision: str, golden: Golden
) -> tuple[EngineRecord, Golden]:
    compiler, staged = backend(job.backend), job.staged
    options = job.options._replace(precision=precision)
    job.progress.stage("compile")
    compiled = compiler.compile(job.onnx, staged, options, job.progress.advance)
    record = engine_record(staged, job.backend, compiled, options, deviation={})

    job.progress.stage("check")
    if job.backend in GPU_BACKENDS and (reason := compiler.incompatibility(record)):
        job.progress.warn(
            f"{record.name} cannot run on this machine and was not checked: {reason}. "
            "Each server checks it when it loads it"
        )
        return record, golden
    try:
        with loaded_engine(compiler, staged, record, job.shape) as engine:
            if job.backend == "null":
                answers = _probabilities(engine, golden.pixels)
                golden = Golden(golden.pixels, answers, golden.activation)
            deviation = golden_check.check(engine, golden, precision)
    except golden_check.GoldenMismatch:
        for file in compiled.files:
            (staged / file).unlink()
        raise
    return msgspec.structs.replace(record, deviation=deviation), golden


@contextmanager
def loaded_engine(
    compiler: Backend, folder: Path, record: EngineRecord, shape: tuple[int, int, int]
) -> Iterator[Engine]:
    """An engine that was just compiled. Raises EngineFailure."""
    engine = compiler.load(folder, record, shape, threads=available_cores())
    try:
        yield engine
    finally:
        engine.close()


def _probabilities(engine: Engine, pixels: Pixels) -> NDArray[np.float32]:
    rows = [infer(engine.instances[0], pixels[row : row + 1]) for row in range(len(pixels))]
    return np.concatenate([outputs.probabilities for outputs in rows])
