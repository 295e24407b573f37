"""The golden check: does an engine reproduce the answers of eager float32 PyTorch in every row?

It runs when an engine is built and every time one is loaded. A model becomes READY only if it
passes.

An answer's deviation says how far it is from the expected answer, relative to what would be wrong:

- The distance between two answers is the root mean square difference of their log-probabilities.
- The deviation is the distance between an answer and the expected one, divided by the distance
  between the expected answer and the nearest expected answer to another golden image, see
  `deviation_scale`.

So 0 % is an exact match, and 100 % is as far off as the answer to another image. A limit on the
probabilities themselves would be too weak for untrained networks. They give each of a thousand
classes about the same probability for every image, and so does a broken engine.

With sigmoid, a class is a decision by itself: present with p, absent with 1 - p. The
log-probability of both counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.engines.base import Engine, Instance, Outputs, infer
from server.images.input_spec import Pixels
from server.repository.manifest import Activation
from server.repository.reader import Golden

# Limits by precision, measured over all networks. Untrained ones amplify rounding errors the most.
# int8: a network keeps its classes with deviations of up to 41 % (ResNet-50, untrained) and 34 %
# (LeNet-5, trained; 100 % of its classes); with a wrong kernel the deviation is above 100 %. So the
# check only tells whether the engine works. How accurate it is, the build measures on more images.
MAX_DEVIATION = {"fp32": 0.005, "fp16": 0.05, "bf16": 0.25, "int8": 0.75}

# How much the answers may differ when every row holds the same image. Kernels split a batch in
# different ways, so sums are added in a different order and round differently.
MAX_ROW_DEVIATION = {"fp32": 0.002, "fp16": 0.02, "bf16": 0.05, "int8": 0.15}

# Added to probabilities before the logarithm, because half precision rounds tiny ones to zero.
PROBABILITY_FLOOR = 1e-6
# With sigmoid, half precision also rounds probabilities near 1, where bf16 has steps of 0.004.
SIGMOID_FLOOR = 0.02

# Expected answers closer than this count as the same answer.
MIN_SCALE = 1e-3

# Least scale of an answer, relative to the median distance to the others. Without it, bf16 would be
# refused for 58 % of networks with 2 classes and 2 % with 7 (ResNet-18, random last layers); with
# it, for 15 % and none.
NEAR = 0.25

SUM_TOLERANCE = 0.02  # for a sum of a thousand bf16 numbers with 8 significant bits each


class GoldenMismatch(Exception):
    """The engine's answers are wrong. The message says how far off they are."""


def check(
    engine: Engine, golden: Golden, precision: str, sizes: Sequence[int] = ()
) -> dict[str, float]:
    """Runs the golden inputs through every instance at each batch size.

    Without `sizes` it checks batch size 1, 3 and the largest. Returns the largest deviation by
    batch size. Raises GoldenMismatch or EngineFailure.
    """
    sizes = sizes or sorted({1, min(3, engine.max_batch), engine.max_batch})
    worst = dict.fromkeys(map(str, sizes), 0.0)
    for instance in engine.instances:
        for size in sizes:
            found = _check_size(instance, golden, size, precision)
            worst[str(size)] = max(worst[str(size)], found)
    return worst


def compare(answer: Outputs, golden: Golden, precision: str) -> float:
    """The deviation of the answer to all golden inputs, in their order.

    Raises GoldenMismatch if it exceeds the limit of the precision.
    """
    _check_format(answer, golden, len(golden.pixels))
    expected, activation = golden.probabilities, golden.activation
    scale = deviation_scale(expected, activation)
    found = deviation(expected, answer.probabilities, scale, activation)
    if not found <= MAX_DEVIATION[precision]:
        raise GoldenMismatch(
            f"answers deviate {found:.2%} from the expected ones; "
            f"{precision} allows {MAX_DEVIATION[precision]:.2%}"
        )
    return found


def deviation(
    expected: NDArray[np.float32],
    answers: NDArray[np.float32],
    scale: NDArray[np.float32],
    activation: Activation = "softmax",
) -> float:
    """The largest distance between rows of [N, classes], each divided by its scale [N]."""
    return float((_distance(expected, answers, activation) / scale).max())


def deviation_scale(
    expected: NDArray[np.float32], activation: Activation = "softmax"
) -> NDArray[np.float32]:
    """The distance that counts as 100 % for each answer: [G, classes] -> [G].

    It is the distance to the nearest different answer, but at least NEAR of the median distance:
    with two or three classes, some answers lie close together by chance. The uniform distribution
    counts as an answer; with sigmoid, one half for every class.
    """
    undecided = 1 / expected.shape[1] if activation == "softmax" else 0.5
    uniform = np.full_like(expected[:1], undecided)
    others = np.stack(
        [_distance(expected, other, activation) for other in (*expected, uniform)], axis=1
    )
    different = [row[row >= MIN_SCALE] for row in others]  # not the answer itself, nor equal ones
    return np.array(
        [max(row.min(), NEAR * np.median(row)) if len(row) else MIN_SCALE for row in different],
        np.float32,
    )


def _distance(
    one: NDArray[np.float32], other: NDArray[np.float32], activation: Activation
) -> NDArray[np.float32]:
    """The root mean square difference of log-probabilities: [N, classes] -> [N]."""
    floor = PROBABILITY_FLOOR
    if activation == "sigmoid":
        one, other = (np.concatenate([each, 1 - each], axis=-1) for each in (one, other))
        floor = SIGMOID_FLOOR
    difference = np.log(one + floor) - np.log(other + floor)
    distance: NDArray[np.float32] = np.sqrt(np.square(difference).mean(axis=1))
    return distance


def _check_size(instance: Instance, golden: Golden, size: int, precision: str) -> float:
    """Checks one batch size on one instance and returns its largest deviation."""
    limit, row_limit = MAX_DEVIATION[precision], MAX_ROW_DEVIATION[precision]
    activation = golden.activation
    scale = deviation_scale(golden.probabilities, activation)
    rows = len(golden.pixels)
    worst = 0.0
    for first in range(0, rows, size):
        chosen = np.arange(first, first + size) % rows  # the last batch wraps to the first rows
        answer = infer(instance, golden.pixels[chosen])
        _check_format(answer, golden, size)
        expected = golden.probabilities[chosen]
        worst = max(worst, deviation(expected, answer.probabilities, scale[chosen], activation))
    same_image: Pixels = np.repeat(golden.pixels[:1], size, axis=0)
    answer = infer(instance, same_image)
    _check_format(answer, golden, size)
    same_scale = scale[:1].repeat(size)
    expected = golden.probabilities[:1].repeat(size, axis=0)
    worst = max(worst, deviation(expected, answer.probabilities, same_scale, activation))
    if worst > limit:
        raise GoldenMismatch(
            f"at batch size {size} answers deviate {worst:.2%} from the expected ones; "
            f"{precision} allows {limit:.2%}"
        )
    first_row = answer.probabilities[:1].repeat(size, axis=0)
    spread = deviation(first_row, answer.probabilities, same_scale, activation)
    if spread > row_limit:
        raise GoldenMismatch(
            f"at batch size {size} rows with the same image deviate {spread:.2%} from each other; "
            f"{precision} allows {row_limit:.2%}"
        )
    return worst


def _check_format(answer: Outputs, golden: Golden, rows: int) -> None:
    """Checks shapes, types and ranges. Raises GoldenMismatch."""
    classes, scores, probabilities = answer
    expected = (rows, golden.probabilities.shape[1])
    if probabilities.shape != expected or probabilities.dtype != np.float32:
        raise GoldenMismatch(
            f"probabilities are {probabilities.dtype} {list(probabilities.shape)}; "
            f"they must be float32 {list(expected)}"
        )
    if (
        classes.shape != scores.shape
        or len(classes) != rows
        or classes.dtype != np.int32
        or scores.dtype != np.float32
    ):
        raise GoldenMismatch(
            f"classes are {classes.dtype} {list(classes.shape)} and scores are {scores.dtype} "
            f"{list(scores.shape)}; they must be int32 and float32 of the same shape, {rows} rows"
        )
    if not (probabilities.min() >= 0 and np.isfinite(probabilities).all()):  # NaN is not >= 0
        raise GoldenMismatch("probabilities contain negative, infinite or NaN values")
    if golden.activation == "sigmoid":
        if probabilities.max() > 1:
            raise GoldenMismatch(f"a probability is {probabilities.max():.3f}; at most 1 is right")
    elif np.abs(probabilities.sum(axis=1) - 1).max() > SUM_TOLERANCE:
        raise GoldenMismatch(
            f"the probabilities of a row sum to {probabilities.sum(axis=1).max():.3f}; "
            "they must sum to 1"
        )
    if classes.min() < 0 or classes.max() >= probabilities.shape[1]:
        raise GoldenMismatch(
            f"classes range from {classes.min()} to {classes.max()}; "
            f"they must be 0 to {probabilities.shape[1] - 1}"
        )
    best = -np.sort(-probabilities, axis=1)[:, : scores.shape[1]]
    by_class = np.take_along_axis(probabilities, classes, axis=1)
    if not (np.allclose(scores, best, atol=1e-6) and np.allclose(scores, by_class, atol=1e-6)):
        raise GoldenMismatch(
            "scores are not the largest probabilities in descending order, or do not match their "
            "classes"
        )
