"""Classifies images on this machine: with an engine, or with eager PyTorch.

Images are decoded like those of a request to the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from model_repo.evaluation.dataset import Sample, decoded_file
from model_repo.evaluation.metrics import TOP
from model_repo.evaluation.predictions import Predictions, empty
from model_repo.export import ServedNetwork
from model_repo.onnx_import.network import OnnxNetwork
from server.engines.base import Engine, Outputs, backend, infer
from server.engines.record import preference
from server.errors import EngineFailure
from server.images.input_spec import InputSpec, Pixels
from server.process.cores import available_cores
from server.repository import reader
from server.repository.manifest import EngineRecord, InvalidVersion, Manifest

EAGER_BATCH = 16

Progress = Callable[[int], None]  # receives the number of images that are done
Classify = Callable[[Pixels], Outputs]


def predict_with_engine(
    engine: Engine, spec: InputSpec, samples: Sequence[Sample], source: str, progress: Progress
) -> Predictions:
    """Raises EngineFailure."""
    instance = max(engine.instances, key=lambda each: each.units)
    return _predict(
        lambda pixels: infer(instance, pixels), engine.max_batch, spec, samples, source, progress
    )


def predict_eagerly(
    served: ServedNetwork,
    spec: InputSpec,
    samples: Sequence[Sample],
    progress: Progress,
) -> Predictions:
    """The answers of float32 PyTorch without a compiler; for an ONNX file those of ONNX Runtime."""
    is_onnx = isinstance(served.network, OnnxNetwork)
    source = "ONNX Runtime" if is_onnx else "eager float32 PyTorch"

    def classify(pixels: Pixels) -> Outputs:
        with torch.inference_mode():
            outputs = served(torch.from_numpy(pixels))
        return Outputs(*(each.numpy() for each in outputs))

    return _predict(classify, EAGER_BATCH, spec, samples, source, progress)


@contextmanager
def opened_engine(folder: Path, manifest: Manifest, name: str = "") -> Iterator[tuple[Engine, str]]:
    """An engine of a published version, with its name: the given one, or the best that works here.

    Raises InvalidVersion with a reason for each engine.
    """
    records = sorted(manifest.engines, key=preference)
    if name:
        records = [record for record in records if record.name == name]
        if not records:
            known = ", ".join(record.name for record in manifest.engines)
            raise InvalidVersion(f"there is no engine {name!r}; the version has {known}")
    reasons = []
    for record in records:
        try:
            engine = _load(folder, manifest, record)
        except (InvalidVersion, EngineFailure) as error:
            reasons.append(f"{record.name}: {error}")
            continue
        try:
            yield engine, record.name
        finally:
            engine.close()
        return
    raise InvalidVersion("no engine works on this machine: " + "; ".join(reasons))


def _load(folder: Path, manifest: Manifest, record: EngineRecord) -> Engine:
    try:
        chosen = backend(record.backend)
    except (ValueError, ImportError) as error:
        raise InvalidVersion(str(error)) from None
    if reason := chosen.incompatibility(record):
        raise InvalidVersion(reason)
    reader.verify_files(folder, manifest, record)
    shape = manifest.input.spec().shape
    return chosen.load(folder, record, shape, threads=available_cores())


def _predict(
    classify: Classify,
    max_batch: int,
    spec: InputSpec,
    samples: Sequence[Sample],
    source: str,
    progress: Progress,
) -> Predictions:
    started_s = time.perf_counter()
    unreadable: dict[int, str] = {}
    classes, confidence = empty(len(samples), TOP)
    done = 0
    for batch in _decoded_batches(samples, spec, max_batch):
        rows = {}
        for index, made in batch:
            if isinstance(made, str):
                unreadable[index] = made
            else:
                rows[index] = made
        if rows:
            outputs = classify(np.stack(list(rows.values())))
            known = min(TOP, outputs.classes.shape[1])
            classes[list(rows), :known] = outputs.classes[:, :known]
            confidence[list(rows)] = outputs.scores[:, 0]
        done += len(batch)
        progress(done)
    return Predictions(
        source=source,
        classes=classes,
        confidence=confidence,
        unreadable=unreadable,
        seconds=time.perf_counter() - started_s,
    )


def _decoded_batches(
    samples: Sequence[Sample], spec: InputSpec, size: int
) -> Iterator[list[tuple[int, Pixels | str]]]:
    """Indices with pixels, or with the reason why there are none; decodes one batch ahead."""
    with ThreadPoolExecutor(available_cores(), "decode") as threads:

        def begin(first: int) -> list[tuple[int, Future[Pixels | str]]]:
            numbered = enumerate(samples[first : first + size], first)
            return [
                (index, threads.submit(decoded_file, each.path, spec)) for index, each in numbered
            ]

        waiting = begin(0)
        for first in range(0, len(samples), size):
            batch, waiting = waiting, begin(first + size)
            yield [(index, future.result()) for index, future in batch]
