"""A gate on publishing: a version that classifies badly is not published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model_repo.evaluation.dataset import DataSet
from model_repo.evaluation.evaluation import check_readable, truth_of
from model_repo.evaluation.metrics import Comparison, compare, score
from model_repo.evaluation.predictions import Predictions

DEFAULT_MAX_DROP = 0.005


class GateClosed(Exception):
    """An engine is not accurate enough to be published. The message says by how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What an engine must reach on labelled images before its version is published."""

    data: Path
    min_top1: float | None = None
    max_drop: float = DEFAULT_MAX_DROP  # of top-1, below eager PyTorch and below the served version

    def __post_init__(self) -> None:
        for name, value in (("--min-top1", self.min_top1), ("--max-drop", self.max_drop)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be a fraction from 0 to 1, not {value:g}")


def check_gate(
    gate: Gate,
    data: DataSet,
    labels: tuple[str, ...],
    predictions: Predictions,
    references: tuple[Predictions, ...],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Reports what was found. Raises GateClosed with everything that fails, and DataError."""
    check_readable(data, predictions)
    truth = truth_of(data)
    top1 = score(truth, predictions, labels).top1
    count = int(predictions.is_readable.sum())
    report(
        f"{predictions.source}: top-1 {top1.value:.4f} ({top1.low:.4f} to {top1.high:.4f}) on "
        f"{count:,} images"
    )
    failures = []
    if gate.min_top1 is not None and top1.value < gate.min_top1:
        failures.append(
            f"top-1 is {top1.value:.4f}, and --min-top1 is {gate.min_top1:g}: "
            f"{gate.min_top1 - top1.value:.4f} too low"
        )
    for reference in references:
        check_readable(data, reference)
        compared = compare(truth, predictions, reference)
        report(f"{predictions.source}: {described(compared)}")
        if -compared.difference > gate.max_drop:
            failures.append(
                f"top-1 is {-compared.difference:.4f} below {reference.source} "
                f"({compared.reference_top1:.4f}), and --max-drop is {gate.max_drop:g}"
            )
    if failures:
        raise GateClosed(
            f"{predictions.source} is not accurate enough on {gate.data} ({count:,} images), so "
            f"nothing was published: {'; '.join(failures)}"
        )


def described(compared: Comparison) -> str:
    """A comparison in words: the difference, its interval, and whether it may be chance."""
    verdict = (
        "the difference is real" if compared.is_significant else "the difference may be chance"
    )
    if compared.difference == 0:
        verdict = "no difference"
    return (
        f"top-1 {compared.difference:+.4f} ({compared.low:+.4f} to {compared.high:+.4f}) against "
        f"{compared.reference} with {compared.reference_top1:.4f}; {verdict} "
        f"(p = {compared.p_value:.2g}, {compared.only_this} and {compared.only_reference} images "
        f"right in one only)"
    )
