"""The golden check: does an engine give the answers of eager float32 PyTorch, in every row?

Asked when an engine is built and again whenever it is loaded: a model is READY only after it.

The yardstick is the model's own: how far an answer is from the truth, as a share of the way from
the truth to the nearest answer that would be wrong, which is that of another golden image. A share
of a probability would say nothing of a network that is unsure: where all classes get about a
thousandth, a network of garbage gives about a thousandth too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.engines.base import Engine, Instance, Outputs, infer
from server.images.input_spec import Pixels
from server.repository.reader import Golden

# Largest deviation allowed, by precision, see `deviation`. Measured over the networks, untrained
# ones among them, which amplify rounding most: see docs of each build's passport.
MAX_DEVIATION = {"fp32": 0.005, "fp16": 0.05, "bf16": 0.25}

# The same image in every row must give the same answer up to this share: kernels block a batch in
# different ways, and sums in another order round differently.
MAX_ROW_DEVIATION = {"fp32": 0.002, "fp16": 0.02, "bf16": 0.05}

# Below this a probability is as good as none: half precision has no smaller numbers to speak of.
NOTHING = 1e-6

# The smallest yardstick: answers closer than this are the same answer.
SAME = 1e-3

SUM_TOLERANCE = 0.02  # a thousand bf16 numbers, each rounded to its 8 bits


class GoldenMismatch(Exception):
    """An engine is further from the truth than its precision explains; the message says how far."""


def check(
    engine: Engine, golden: Golden, precision: str, sizes: Sequence[int] = ()
) -> dict[str, float]:
    """Runs the golden inputs through every instance at these batch sizes; none named are 1, an odd
    one and the largest.

    Returns the largest deviation by batch size. Raises Deviates, or EngineFailure.
    """
    sizes = sizes or sorted({1, min(3, engine.max_batch), engine.max_batch})
    worst = dict.fromkeys(map(str, sizes), 0.0)
    for instance in engine.instances:
        for size in sizes:
            found = _check_size(instance, golden, size, precision)
            worst[str(size)] = max(worst[str(size)], found)
    return worst


def compare(answer: Outputs, golden: Golden, precision: str) -> float:
    """How far the answer to the golden inputs, in their order, is from the truth.

    Raises Deviates where that is further than the precision explains.
    """
    _check_form(answer, golden, len(golden.pixels))
    truth = golden.probabilities
    found = deviation(truth, answer.probabilities, deviation_scale(truth))
    if not found <= MAX_DEVIATION[precision]:
        raise GoldenMismatch(
            f"an answer is {found:.2%} of the way from eager PyTorch's to a wrong one; "
            f"{precision} allows {MAX_DEVIATION[precision]:.2%}"
        )
    return found


def deviation(
    truth: NDArray[np.float32], answers: NDArray[np.float32], yardstick: NDArray[np.float32]
) -> float:
    """The largest distance between rows of [N, classes], as a share of the scale [N]."""
    return float((_distance(truth, answers) / yardstick).max())


def deviation_scale(truth: NDArray[np.float32]) -> NDArray[np.float32]:
    """[G, classes] -> [G]: the distance from each answer to the nearest other one.

    An answer that has no other is measured by its distance from knowing nothing.
    """
    nothing_known = np.full_like(truth[:1], 1 / truth.shape[1])
    others = np.stack([_distance(truth, other) for other in (*truth, nothing_known)], axis=1)
    others[others < SAME] = np.inf  # itself, and images that it can't be told from
    nearest = others.min(axis=1)
    return np.where(np.isinf(nearest), SAME, nearest).astype(np.float32)


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square over classes of the difference of log-probabilities; [N, classes] -> [N]."""
    difference = np.log(one + NOTHING) - np.log(other + NOTHING)
    distance: NDArray[np.float32] = np.sqrt(np.square(difference).mean(axis=1))
    return distance


def _check_size(instance: Instance, golden: Golden, size: int, precision: str) -> float:
    limit, row_limit = MAX_DEVIATION[precision], MAX_ROW_DEVIATION[precision]
    scale = deviation_scale(golden.probabilities)
    rows = len(golden.pixels)
    worst = 0.0
    for first in range(0, rows, size):  # a short end is filled from the beginning
        chosen = np.arange(first, first + size) % rows
        answer = infer(instance, golden.pixels[chosen])
        _check_form(answer, golden, size)
        truth = golden.probabilities[chosen]
        worst = max(worst, deviation(truth, answer.probabilities, scale[chosen]))
    same: Pixels = np.repeat(golden.pixels[:1], size, axis=0)
    answer = infer(instance, same)
    _check_form(answer, golden, size)
    alike = scale[:1].repeat(size)
    truth = golden.probabilities[:1].repeat(size, axis=0)
    worst = max(worst, deviation(truth, answer.probabilities, alike))
    if worst > limit:
        raise GoldenMismatch(
            f"at batch {size} an answer is {worst:.2%} of the way from eager PyTorch's to a wrong "
            f"one; {precision} allows {limit:.2%}"
        )
    first_row = answer.probabilities[:1].repeat(size, axis=0)
    spread = deviation(first_row, answer.probabilities, alike)
    if spread > row_limit:
        raise GoldenMismatch(
            f"at batch {size} the same image in every row gives answers {spread:.2%} of the way to "
            f"a wrong one apart; {precision} allows {row_limit:.2%}"
        )
    return worst


def _check_form(answer: Outputs, golden: Golden, rows: int) -> None:
    classes, scores, probabilities = answer
    expected = (rows, golden.probabilities.shape[1])
    if probabilities.shape != expected or probabilities.dtype != np.float32:
        raise GoldenMismatch(
            f"probabilities are {probabilities.dtype} {list(probabilities.shape)}, "
            f"not float32 {list(expected)}"
        )
    if (
        classes.shape != scores.shape
        or len(classes) != rows
        or classes.dtype != np.int32
        or scores.dtype != np.float32
    ):
        raise GoldenMismatch(
            f"classes are {classes.dtype} {list(classes.shape)} "
            f"and scores {scores.dtype} {list(scores.shape)}"
        )
    if not (probabilities.min() >= 0 and np.isfinite(probabilities).all()):  # NaN is not >= 0
        raise GoldenMismatch("probabilities hold numbers that are none")
    if np.abs(probabilities.sum(axis=1) - 1).max() > SUM_TOLERANCE:
        raise GoldenMismatch(
            f"probabilities of a row add up to {probabilities.sum(axis=1).max():.3f}"
        )
    if classes.min() < 0 or classes.max() >= probabilities.shape[1]:
        raise GoldenMismatch(f"classes reach from {classes.min()} to {classes.max()}")
    best = -np.sort(-probabilities, axis=1)[:, : scores.shape[1]]
    named = np.take_along_axis(probabilities, classes, axis=1)
    if not (np.allclose(scores, best, atol=1e-6) and np.allclose(scores, named, atol=1e-6)):
        raise GoldenMismatch(
            "scores are not the largest probabilities, best first, of the classes named"
        )
