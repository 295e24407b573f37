"""An evaluation as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from model_repo.evaluation.evaluation import EvaluationDocument
from model_repo.evaluation.gate import described
from model_repo.evaluation.report import percent

MAX_CLASSES = 15
MAX_CONFUSIONS = 5
MAX_FILES = 5


def print_tables(console: Console, document: EvaluationDocument) -> None:
    """Prints the scores, the weakest classes and the most frequent confusions."""
    scores = document.scores
    console.print(_summary(document))
    for compared in document.comparisons:
        console.print(described(compared), soft_wrap=True)
    with_images = [each for each in scores.classes if each.images]
    weakest = sorted(with_images, key=lambda each: (each.recall or 0.0, each.index))[:MAX_CLASSES]
    title = "classes" if len(weakest) == len(with_images) else "classes with the lowest recall"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for name in ("images", "precision", "recall", "F1"):
        table.add_column(name, justify="right")
    for each in weakest:
        table.add_row(
            each.label,
            f"{each.images:,}",
            percent(each.precision),
            percent(each.recall),
            percent(each.f1),
        )
    console.print(table)
    for confusion in scores.confusions[:MAX_CONFUSIONS]:
        console.print(
            f"{confusion.images:,} x {confusion.truth_label} taken for {confusion.answer_label}",
            soft_wrap=True,
        )


def _summary(document: EvaluationDocument) -> Table:
    scores = document.scores
    table = Table(
        title=f"{document.source} on {document.data}", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    interval = f"{percent(document.top1_low)} to {percent(document.top1_high)} (95 %)"
    table.add_row("top-1", percent(document.top1), interval)
    if document.top5 is not None and scores.top5 is not None:
        low, high = percent(scores.top5.low), percent(scores.top5.high)
        table.add_row("top-5", percent(document.top5), f"{low} to {high} (95 %)")
    table.add_row("mean recall", percent(scores.mean_recall), "of the classes with images")
    table.add_row("calibration error", percent(document.calibration_error), "ECE, 15 bins")
    table.add_row("images", f"{document.images:,}", "")
    table.add_row("images/s", f"{document.images_per_s:,.0f}", "decoding included")
    return table
