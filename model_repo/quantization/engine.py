"""Compiles an INT8 engine and checks how often it agrees with float32.

The golden check tells a broken engine from a working one. Whether 8 bits are enough for a network
needs more images: the engine must give the same class as float32 for nearly all images that float32
is sure of. If it does not, some layers go back to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model_repo.compile import CompileJob, compile_engine, loaded_engine
from model_repo.quantization.calibration import CalibrationImages
from model_repo.quantization.openvino import float_layers, quantized, quantized_within
from server.engines.base import Engine, backend, infer
from server.engines.golden_check import GoldenMismatch
from server.errors import EngineFailure
from server.images.input_spec import Pixels
from server.repository.manifest import EngineRecord, QuantizationRecord
from server.repository.reader import Golden

CONFIDENT = 0.5  # probability from which float32 is sure
MIN_CONFIDENT = 50  # images; with fewer the agreement says little
BATCH = 8
DEFAULT_MIN_AGREEMENT = 0.99


class NotAccurate(Exception):
    """The INT8 engine answers too often otherwise than float32. The message has the figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Options:
    """How a network is quantised, and what the engine must reach."""

    images: CalibrationImages
    trained: bool  # an untrained network has no sure answers, so agreement is not demanded
    min_agreement: float | None  # None: something else judges the engine


class Reference(NamedTuple):
    """What float32 answers to the check images."""

    classes: NDArray[np.int64]  # [M]
    is_confident: NDArray[np.bool_]  # [M]

    def agreement(self, classes: NDArray[np.int64]) -> float:
        """The fraction of equal classes where float32 is sure; of all images if it never is."""
        return self.agreement_of(range(len(classes)), classes)

    def agreement_of(self, numbers: Sequence[int], classes: NDArray[np.int64]) -> float:
        """The same for some of the images."""
        chosen = np.asarray(numbers)
        equal = classes == self.classes[chosen]
        sure = self.is_confident[chosen]
        return float(equal[sure].mean() if sure.any() else equal.mean())


def compile_int8(job: CompileJob, golden: Golden, options: Int8Options) -> EngineRecord:
    """Raises NotAccurate, GoldenMismatch, EngineFailure."""
    images = options.images
    reference = _reference(job.onnx, images.check)
    confident = int(reference.is_confident.sum())
    needed = options.min_agreement if options.trained else None
    if needed is not None and confident < MIN_CONFIDENT:
        job.progress.warn(
            f"float32 is sure of only {confident} of {len(images.check)} images of "
            f"{images.folder}; are they like those of your callers?"
        )
    attempt = partial(_attempt, job, golden, options, reference, needed)
    try:
        return attempt(lambda model: quantized(model, images.calibration))
    except (GoldenMismatch, NotAccurate) as error:
        if needed is None:
            raise
        job.progress.warn(f"{error}; trying again with sensitive layers in float32")
    max_drop = 1 - needed

    def quantize_within(model: Any) -> Any:
        validate = reference.agreement_of
        return quantized_within(model, images.calibration, images.check, validate, max_drop)

    return attempt(quantize_within)


def _attempt(
    job: CompileJob,
    golden: Golden,
    options: Int8Options,
    reference: Reference,
    needed: float | None,
    quantize: Callable[[Any], Any],
) -> EngineRecord:
    """One quantisation, with the golden check and the agreement of its engine."""
    kept: list[str] = []

    def quantize_model(model: Any) -> Any:
        try:
            made = quantize(model)
        except Exception as error:  # of NNCF, which has no common class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineFailure(f"NNCF can't quantise the network: {reason[:300]}") from error
        kept[:] = float_layers(made)
        return made

    changed = replace(job, options=job.options._replace(quantize=quantize_model))
    record, _ = compile_engine(changed, ("int8",), golden)
    with loaded_engine(backend(job.backend), job.staged, record, job.shape) as engine:
        found = reference.agreement(_classes(engine, options.images.check))
    confident = int(reference.is_confident.sum())
    sure = " that float32 is sure of" if confident else ""
    untrained = "" if options.trained else "; the network is untrained, so this proves nothing"
    job.progress.tell(
        f"int8 gives the class of float32 for {found:.2%} of {confident or len(reference.classes)} "
        f"images{sure}{untrained}"
    )
    if needed is not None and found < needed:
        raise NotAccurate(
            f"int8 gives the class of float32 for {found:.2%} of the images that float32 is sure "
            f"of; {needed:.2%} are needed (--min-agreement)"
        )
    return msgspec.structs.replace(
        record,
        quantization=QuantizationRecord(
            calibration=options.images.folder.resolve().name,
            calibration_images=len(options.images.calibration),
            check_images=len(options.images.check),
            confident_images=confident,
            agreement=found,
            float_layers=tuple(kept),
        ),
    )


def _classes(engine: Engine, pixels: Pixels) -> NDArray[np.int64]:
    instance = max(engine.instances, key=lambda each: each.units)
    size = min(BATCH, engine.max_batch)
    batches = [pixels[first : first + size] for first in range(0, len(pixels), size)]
    return np.concatenate([infer(instance, batch).classes[:, 0].astype(int) for batch in batches])


def _reference(onnx: Path, pixels: Pixels) -> Reference:
    """The answers of the exported float32 graph in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    classes, confidence = [], []
    for first in range(0, len(pixels), BATCH):
        found, scores, _ = session.run(None, {"pixels": pixels[first : first + BATCH]})
        classes.append(found[:, 0].astype(np.int64))
        confidence.append(scores[:, 0])
    return Reference(np.concatenate(classes), np.concatenate(confidence) > CONFIDENT)
