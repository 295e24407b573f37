"""One evaluation: the scores of a model on a data set, and how it compares with a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import numpy as np

from model_repo.evaluation.dataset import DataError, DataSet, Sample
from model_repo.evaluation.metrics import Comparison, Labels, Scores, compare, score
from model_repo.evaluation.predictions import Predictions
from server.repository.evaluation import EvaluationRecord


class EvaluationDocument(EvaluationRecord, frozen=True, kw_only=True):
    """The content of evaluation.json and of --json: the summary, and all scores."""

    model: str
    version: int
    source: str  # what answered
    images_per_s: float  # decoding included
    ignored_files: int  # that are not images by their ending
    unreadable_files: tuple[str, ...]
    scores: Scores
    comparisons: tuple[Comparison, ...] = ()


class Evaluated(NamedTuple):
    """A document, and what it was made from."""

    document: EvaluationDocument
    data: DataSet
    labels: Sequence[str]
    predictions: Predictions


Predict = Callable[[Sequence[Sample]], Predictions]


def evaluate(
    data: DataSet,
    labels: Sequence[str],
    predict: Predict,
    references: Sequence[Predict] = (),
    *,
    model: str,
    version: int,
    engine: str,
) -> Evaluated:
    """Classifies the images, and again with each reference. Raises DataError."""
    predictions = predict(data.samples)
    truth = truth_of(data)
    check_readable(data, predictions)
    scores = score(truth, predictions, labels)
    comparisons = tuple(compare(truth, predictions, each(data.samples)) for each in references)
    document = EvaluationDocument(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        data=data.root.resolve().name,
        engine=engine,
        images=scores.images,
        top1=scores.top1.value,
        top1_low=scores.top1.low,
        top1_high=scores.top1.high,
        top5=None if scores.top5 is None else scores.top5.value,
        calibration_error=scores.calibration_error,
        model=model,
        version=version,
        source=predictions.source,
        images_per_s=predictions.images_per_s,
        ignored_files=len(data.ignored),
        unreadable_files=tuple(
            f"{data.samples[index].path}: {reason}"
            for index, reason in sorted(predictions.unreadable.items())
        ),
        scores=scores,
        comparisons=comparisons,
    )
    return Evaluated(document, data, labels, predictions)


def truth_of(data: DataSet) -> Labels:
    """The true classes, [N]."""
    return np.array([sample.label for sample in data.samples], np.int64)


def check_readable(data: DataSet, predictions: Predictions) -> None:
    """Raises DataError if no image could be read."""
    if not predictions.is_readable.any():
        index, reason = next(iter(predictions.unreadable.items()))
        raise DataError(
            f"none of the {len(data.samples)} images can be read; the first is "
            f"{data.samples[index].path}: {reason}"
        )


def encoded(document: EvaluationDocument) -> bytes:
    """The document as JSON text."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
