"""Accuracy of predictions, and whether two sets of predictions differ by more than chance.

Definitions:

- top-k: fraction of images whose class is among the k most probable ones.
- precision of a class: fraction of right answers among the answers that name it. recall: fraction
  of its images that were recognised. F1: their harmonic mean.
- expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017):
  difference between confidence and accuracy, averaged over 15 bins of equal width, weighted by the
  images of each bin.
- Intervals hold the true value with 95 % probability: for one accuracy Wilson's interval, for a
  difference the paired bootstrap over images. The p-value is that of McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from model_repo.evaluation.predictions import NO_CLASS, Predictions

TOP = 5
BINS = 15
LEVEL = 0.95  # of intervals
RESAMPLES = 10_000
SEED = 0
MAX_CONFUSIONS = 20

Labels = NDArray[np.int64]  # [N], the true classes


class Proportion(Struct, frozen=True, kw_only=True):
    """A fraction of images, with its confidence interval."""

    value: float
    low: float
    high: float


class ClassScore(Struct, frozen=True, kw_only=True):
    """How well one class is recognised. None: there is nothing to divide by."""

    index: int
    label: str
    images: int
    answers: int  # how often it was the best class
    precision: float | None
    recall: float | None
    f1: float | None


class Confusion(Struct, frozen=True, kw_only=True):
    """How often images of one class were taken for another."""

    truth: int
    answer: int
    truth_label: str
    answer_label: str
    images: int


class CalibrationBin(Struct, frozen=True, kw_only=True):
    """The images whose confidence is above `low` and at most `high`."""

    low: float
    high: float
    images: int
    confidence: float  # mean
    accuracy: float


class Scores(Struct, frozen=True, kw_only=True):
    """The accuracy of one set of predictions."""

    images: int  # that could be read
    unreadable: int
    top1: Proportion
    top5: Proportion | None  # None: fewer than five classes are known for each image
    mean_recall: float  # over the classes that have images, each with the same weight
    calibration_error: float
    calibration: tuple[CalibrationBin, ...]
    classes: tuple[ClassScore, ...]
    confusions: tuple[Confusion, ...]  # the most frequent ones first


class Comparison(Struct, frozen=True, kw_only=True):
    """Top-1 of a set of predictions minus that of a reference, on the same images."""

    reference: str
    reference_top1: float
    difference: float
    low: float
    high: float
    only_this: int  # images that only the first set has right
    only_reference: int
    agreement: float  # fraction of images with the same best class
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether chance explains the difference in less than 5 % of cases."""
        return self.p_value < 1 - LEVEL


class Paired(NamedTuple):
    """Which images each of two sets has right, for the images that both could read."""

    this: NDArray[np.bool_]
    reference: NDArray[np.bool_]


def score(truth: Labels, predictions: Predictions, labels: Sequence[str]) -> Scores:
    """Scores the predictions. At least one image must be readable."""
    readable = predictions.is_readable
    truth, classes = truth[readable], predictions.classes[readable]
    confidence = predictions.confidence[readable]
    hits = classes[:, :TOP] == truth[:, np.newaxis]
    correct = hits[:, 0]
    count = len(truth)
    has_top5 = classes.shape[1] >= TOP and len(labels) > TOP and classes[0, TOP - 1] != NO_CLASS
    scores = _class_scores(truth, classes[:, 0], labels)
    recalls = [each.recall for each in scores if each.recall is not None]
    bins = _calibration(correct, confidence)
    return Scores(
        images=count,
        unreadable=len(readable) - count,
        top1=proportion(int(correct.sum()), count),
        top5=proportion(int(hits.any(axis=1).sum()), count) if has_top5 else None,
        mean_recall=sum(recalls) / len(recalls),
        calibration_error=sum(
            each.images / count * abs(each.confidence - each.accuracy) for each in bins
        ),
        calibration=bins,
        classes=scores,
        confusions=_confusions(truth, classes[:, 0], labels),
    )


def proportion(successes: int, count: int) -> Proportion:
    """The fraction with Wilson's interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return Proportion(value=successes / count, low=float(interval.low), high=float(interval.high))


def compare(truth: Labels, this: Predictions, reference: Predictions) -> Comparison:
    """Compares two sets of predictions for the same images. At least one must be in both."""
    from scipy.stats import binomtest

    both = this.is_readable & reference.is_readable
    truth = truth[both]
    own, other = this.classes[both, 0], reference.classes[both, 0]
    pair = Paired(own == truth, other == truth)
    only_this = int((pair.this & ~pair.reference).sum())
    only_reference = int((pair.reference & ~pair.this).sum())
    low, high = _bootstrap(only_this, only_reference, len(truth))
    disagreements = only_this + only_reference
    return Comparison(
        reference=reference.source,
        reference_top1=float(pair.reference.mean()),
        difference=(only_this - only_reference) / len(truth),
        low=low,
        high=high,
        only_this=only_this,
        only_reference=only_reference,
        agreement=float((own == other).mean()),
        p_value=float(binomtest(only_this, disagreements).pvalue) if disagreements else 1.0,
    )


def _bootstrap(only_this: int, only_reference: int, count: int) -> tuple[float, float]:
    """The interval of the difference, by drawing the images again with replacement.

    Only three kinds of images matter to the difference, so a draw is one multinomial number.
    """
    rng = np.random.default_rng(SEED)
    shares = np.array([only_this, only_reference, count - only_this - only_reference]) / count
    draws = rng.multinomial(count, shares, RESAMPLES)
    differences = (draws[:, 0] - draws[:, 1]) / count
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _class_scores(
    truth: Labels, answers: NDArray[np.int32], labels: Sequence[str]
) -> tuple[ClassScore, ...]:
    count = len(labels)
    images = np.bincount(truth, minlength=count)
    named = np.bincount(answers, minlength=count)
    right = np.bincount(truth[truth == answers], minlength=count)
    scores = []
    for index, label in enumerate(labels):
        hits, total = int(right[index]), int(images[index] + named[index])
        scores.append(
            ClassScore(
                index=index,
                label=label,
                images=int(images[index]),
                answers=int(named[index]),
                precision=hits / int(named[index]) if named[index] else None,
                recall=hits / int(images[index]) if images[index] else None,
                f1=2 * hits / total if total else None,
            )
        )
    return tuple(scores)


def _confusions(
    truth: Labels, answers: NDArray[np.int32], labels: Sequence[str]
) -> tuple[Confusion, ...]:
    wrong = truth != answers
    pairs, counts = np.unique(
        np.stack([truth[wrong], answers[wrong]], axis=1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:MAX_CONFUSIONS]
    return tuple(
        Confusion(
            truth=int(pairs[each, 0]),
            answer=int(pairs[each, 1]),
            truth_label=labels[pairs[each, 0]],
            answer_label=labels[pairs[each, 1]],
            images=int(counts[each]),
        )
        for each in order
    )


def _calibration(
    correct: NDArray[np.bool_], confidence: NDArray[np.float32]
) -> tuple[CalibrationBin, ...]:
    """The bins that have images."""
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        bins.append(
            CalibrationBin(
                low=float(number) / BINS,
                high=float(number + 1) / BINS,
                images=int(inside.sum()),
                confidence=float(confidence[inside].mean(dtype=np.float64)),
                accuracy=float(correct[inside].mean()),
            )
        )
    return tuple(bins)
