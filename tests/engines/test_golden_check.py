"""The golden check: how it measures deviation, what it runs, and which outputs it rejects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from server.engines.base import Outputs
from server.engines.golden_check import (
    GoldenMismatch,
    check,
    deviation,
    deviation_scale,
)
from server.images.input_spec import Pixels
from server.repository.reader import Golden
from tests.support.fakes.function_engine import SHAPE, FunctionEngine, outputs

Probabilities = NDArray[np.float32]
CLASSES = 20


def softmax(logits: NDArray[np.float64]) -> Probabilities:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)


MATRIX = np.random.default_rng(0).normal(0, 0.3, (np.prod(SHAPE), CLASSES))


def network(pixels: Pixels) -> Probabilities:
    """A small classifier."""
    return softmax((pixels.reshape(len(pixels), -1) / 128 - 1) @ MATRIX)


@pytest.fixture
def expected() -> Golden:
    pixels = np.random.default_rng(1).integers(0, 256, (4, *SHAPE), np.uint8)
    return Golden(pixels, network(pixels))


# --- the deviation ---------------------------------------------------------------------------


def test_the_answer_to_another_image_deviates_by_100_percent_or_more(expected: Golden) -> None:
    scale = deviation_scale(expected.probabilities)
    assert deviation(expected.probabilities, expected.probabilities, scale) == 0
    for shift in (1, 2, 3):
        assert (
            deviation(expected.probabilities, np.roll(expected.probabilities, shift, 0), scale) >= 1
        )


def test_answers_that_are_close_by_chance_do_not_make_the_check_strict() -> None:
    logits = np.array([[0, 2.0], [0, 2.01], [0, -1.0], [0, 4.0]])
    expected = softmax(logits)
    rounded = softmax(logits * 1.01)
    assert deviation(expected, rounded, deviation_scale(expected)) < 0.15
    for shift in (1, 2, 3):
        rolled = np.roll(expected, shift, 0)
        assert deviation(expected, rolled, deviation_scale(expected)) > 1


def test_the_uniform_distribution_deviates_by_100_percent_or_more(expected: Golden) -> None:
    uniform = np.full_like(expected.probabilities, 1 / CLASSES)
    assert deviation(expected.probabilities, uniform, deviation_scale(expected.probabilities)) >= 1


def test_the_deviation_does_not_depend_on_how_confident_a_network_is() -> None:
    logits = np.random.default_rng(2).normal(0, 1, (3, 1000))
    error = np.random.default_rng(3).normal(0, 0.01, (3, 1000))
    found = [
        deviation(
            softmax(k * logits), softmax(k * (logits + error)), deviation_scale(softmax(k * logits))
        )
        for k in (0.1, 1, 2)
    ]
    assert found == pytest.approx([0.01] * 3, rel=0.3)


def test_the_rounding_of_tiny_probabilities_in_half_precision_hardly_counts() -> None:
    logits = np.random.default_rng(4).normal(0, 5, (4, 1000))
    probabilities = softmax(logits)
    assert probabilities.min() < 1e-12
    halves = probabilities.astype(np.float16).astype(np.float32)
    assert deviation(probabilities, halves, deviation_scale(probabilities)) < 0.01


def test_images_with_the_same_answer_do_not_set_the_scale_for_each_other() -> None:
    one, other = softmax(np.random.default_rng(5).normal(0, 1, (2, 8)))
    scale = deviation_scale(np.stack([one, one, other]))
    assert scale[0] == scale[1] > 0.1
    certain = np.tile(np.eye(8, dtype=np.float32)[:1], (2, 1))  # like the null backend
    assert deviation_scale(certain).min() > 1


def sigmoid(logits: NDArray[np.float64]) -> Probabilities:
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def test_with_sigmoid_an_absent_class_counts_as_much_as_a_present_one() -> None:
    logits = np.random.default_rng(6).normal(0, 3, (4, CLASSES))
    expected, mirrored = sigmoid(logits), sigmoid(-logits)
    error = np.random.default_rng(7).normal(0, 0.02, logits.shape)
    found = [
        deviation(sigmoid(s * logits), sigmoid(s * (logits + error)), scale, "sigmoid")
        for s, scale in (
            (1, deviation_scale(expected, "sigmoid")),
            (-1, deviation_scale(mirrored, "sigmoid")),
        )
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert 0 < found[0] < 0.05
    undecided = np.full_like(expected, 0.5)
    scale = deviation_scale(expected, "sigmoid")
    assert deviation(expected, undecided, scale, "sigmoid") >= 1
    assert deviation(expected, np.roll(expected, 1, 0), scale, "sigmoid") >= 1


def test_the_rounding_of_confident_answers_hardly_counts_with_sigmoid() -> None:
    logits = np.random.default_rng(8).normal(0, 6, (6, CLASSES))
    expected = sigmoid(logits)
    assert ((expected > 0.998) & (expected < 0.9999)).any()
    rounded = np.round(expected * 256) / np.float32(256)  # as bf16 does from 0.5 to 1
    scale = deviation_scale(expected, "sigmoid")
    assert deviation(expected, np.where(expected > 0.5, rounded, expected), scale, "sigmoid") < 0.1


def test_with_sigmoid_probabilities_need_not_sum_to_1() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (4, *SHAPE), np.uint8)

    def answers(pixels: Pixels) -> Probabilities:
        return sigmoid((pixels.reshape(len(pixels), -1) / 128 - 1) @ MATRIX)

    engine = FunctionEngine(lambda pixels: outputs(answers(pixels)))
    several = Golden(pixels, answers(pixels), "sigmoid")
    assert max(check(engine, several, "fp32").values()) == 0
    with pytest.raises(GoldenMismatch, match="they must sum to 1"):
        check(engine, several._replace(activation="softmax"), "fp32")
    doubled = FunctionEngine(lambda pixels: outputs(2 * answers(pixels)))
    with pytest.raises(
        GoldenMismatch, match=r"a probability is 1\.\d+; at most 1 is right|deviate"
    ):
        check(doubled, several, "fp32")


# --- what is run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, {1}), (2, {1, 2}), (3, {1, 3}), (5, {1, 3, 5}), (16, {1, 3, 16})]
)
def test_batch_size_1_3_and_the_largest_are_checked(
    expected: Golden, max_batch: int, sizes: set[int]
) -> None:
    engine = FunctionEngine(lambda pixels: outputs(network(pixels)), max_batch=max_batch)
    assert check(engine, expected, "fp32") == dict.fromkeys(map(str, sorted(sizes)), 0)
    assert engine.sizes == sizes


def test_every_instance_is_checked(expected: Golden) -> None:
    engine = FunctionEngine(lambda pixels: outputs(network(pixels)))
    broken = FunctionEngine(lambda pixels: outputs(network(255 - pixels)))
    engine.instances = [engine, broken]
    with pytest.raises(GoldenMismatch):
        check(engine, expected, "bf16")


def test_a_mismatch_says_how_large_the_deviation_is(expected: Golden) -> None:
    with pytest.raises(
        GoldenMismatch,
        match=r"at batch size 1 answers deviate \d+\.\d\d% from the expected ones; bf16 allows",
    ):
        check(FunctionEngine(lambda pixels: outputs(network(255 - pixels))), expected, "bf16")


# --- invalid outputs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a._replace(probabilities=a.probabilities[:, 1:]), "probabilities are float32"),
        (lambda a: a._replace(probabilities=a.probabilities[1:]), "probabilities are float32"),
        (lambda a: a._replace(probabilities=a.probabilities.astype(float)), "are float64"),
        (lambda a: a._replace(probabilities=a.probabilities * np.float32("nan")), "NaN"),
        (lambda a: a._replace(probabilities=-a.probabilities), "contain negative"),
        (lambda a: a._replace(probabilities=a.probabilities * 2), r"sum to 2\.000"),
        (lambda a: a._replace(classes=a.classes.astype(np.int64)), "classes are int64"),
        (lambda a: a._replace(classes=a.classes[:, :5]), "classes are int32"),
        (lambda a: a._replace(classes=a.classes - 1), "classes range from -1|scores are not"),
        (lambda a: a._replace(classes=a.classes + CLASSES), "classes range from"),
        (lambda a: a._replace(classes=a.classes[:, ::-1]), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores[:, ::-1]), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores * np.float32(0.9)), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores * np.float32("nan")), "scores are not the largest"),
    ],
)
def test_invalid_outputs_are_rejected_with_the_reason(
    expected: Golden, spoil: Callable[[Outputs], Outputs], words: str
) -> None:
    with pytest.raises(GoldenMismatch, match=words):
        check(FunctionEngine(lambda pixels: spoil(outputs(network(pixels)))), expected, "bf16")
