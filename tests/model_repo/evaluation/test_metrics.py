"""Scores and comparisons, against numbers computed by hand or by another library."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from model_repo.evaluation.metrics import compare, proportion, score
from model_repo.evaluation.predictions import NO_CLASS, Predictions

LABELS = ("a", "b", "c")


def predictions(best: list[int], confidence: list[float] | None = None) -> Predictions:
    return Predictions(
        source="test",
        classes=np.array(best, np.int32)[:, np.newaxis],
        confidence=np.array(confidence or [0.9] * len(best), np.float32),
    )


def test_scores_of_six_images() -> None:
    truth = np.array([0, 0, 0, 1, 1, 2])
    scores = score(truth, predictions([0, 0, 1, 1, 2, 2]), LABELS)
    assert scores.images == 6
    assert scores.top1.value == pytest.approx(4 / 6)
    assert scores.top5 is None
    assert [each.precision for each in scores.classes] == [1, 0.5, 0.5]
    assert [each.recall for each in scores.classes] == [2 / 3, 0.5, 1]
    assert [each.f1 for each in scores.classes] == pytest.approx([0.8, 0.5, 2 / 3])
    assert scores.mean_recall == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert [(each.truth, each.answer, each.images) for each in scores.confusions] == [
        (0, 1, 1),
        (1, 2, 1),
    ]


def test_precision_and_recall_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 7, 500)
    best = np.where(rng.random(500) < 0.6, truth, rng.integers(0, 7, 500))
    scores = score(truth, predictions(best.tolist()), tuple("abcdefg"))
    precision, recall, f1, images = precision_recall_fscore_support(truth, best)
    assert [each.precision for each in scores.classes] == pytest.approx(precision)
    assert [each.recall for each in scores.classes] == pytest.approx(recall)
    assert [each.f1 for each in scores.classes] == pytest.approx(f1)
    assert [each.images for each in scores.classes] == list(images)


def test_top5_counts_the_first_five_answers() -> None:
    classes = np.array([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [1, 2, 3, 4, 5]], np.int32)
    found = Predictions(source="test", classes=classes, confidence=np.full(3, 0.5, np.float32))
    scores = score(np.array([0, 0, 0]), found, tuple("abcdef"))
    assert scores.top1.value == pytest.approx(1 / 3)
    assert scores.top5 is not None
    assert scores.top5.value == pytest.approx(2 / 3)


def test_a_class_without_images_has_no_recall() -> None:
    scores = score(np.array([0, 0]), predictions([0, 1]), LABELS)
    assert [each.recall for each in scores.classes] == [0.5, None, None]
    assert [each.precision for each in scores.classes] == [1, 0, None]
    assert scores.mean_recall == 0.5


def test_calibration_error_by_hand() -> None:
    # Two bins: confidence 0.95 with accuracy 0.5, and 0.55 with accuracy 1.
    found = predictions([0, 1, 2, 2], [0.95, 0.95, 0.55, 0.55])
    scores = score(np.array([0, 0, 2, 2]), found, LABELS)
    assert scores.calibration_error == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert [each.images for each in scores.calibration] == [2, 2]


def test_images_that_cannot_be_read_are_in_no_figure() -> None:
    scores = score(np.array([0, 1, 2]), predictions([0, NO_CLASS, 2]), LABELS)
    assert (scores.images, scores.unreadable, scores.top1.value) == (2, 1, 1)


def test_wilson_interval() -> None:
    # E. B. Wilson 1927; 81 of 263 is an example of Newcombe, Statistics in Medicine 17 (1998).
    found = proportion(81, 263)
    assert found.low == pytest.approx(0.2553, abs=1e-4)
    assert found.high == pytest.approx(0.3662, abs=1e-4)


def test_mcnemar_and_bootstrap_of_a_real_difference() -> None:
    truth = np.zeros(1000, int)
    this = predictions([0] * 930 + [1] * 70)
    reference = predictions([0] * 900 + [1] * 30 + [1] * 60 + [0] * 10)
    found = compare(truth, this, reference)
    assert (found.only_this, found.only_reference) == (30, 10)
    assert found.difference == pytest.approx(0.02)
    # Two-sided binomial: 2 * sum of C(40, k) / 2^40 for k from 0 to 10.
    assert found.p_value == pytest.approx(0.0022214, rel=1e-3)
    assert found.is_significant
    assert found.low == pytest.approx(0.008, abs=0.002)
    assert found.high == pytest.approx(0.032, abs=0.002)
    assert found.agreement == pytest.approx(0.96)


def test_equal_predictions_do_not_differ() -> None:
    found = compare(np.array([0, 1]), predictions([0, 0]), predictions([0, 0]))
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.is_significant


def test_a_difference_of_one_image_may_be_chance() -> None:
    found = compare(np.array([0, 1, 2]), predictions([0, 1, 2]), predictions([0, 1, 1]))
    assert found.difference == pytest.approx(1 / 3)
    assert not found.is_significant
