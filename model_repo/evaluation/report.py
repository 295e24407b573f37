"""An evaluation as one HTML page that needs nothing else: tables, plots and thumbnails inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model_repo.evaluation.evaluation import Evaluated, truth_of
from model_repo.evaluation.metrics import CalibrationBin

TEMPLATE = "report.html"
MAX_MATRIX_CLASSES = 30
MAX_MISTAKES = 24
THUMBNAIL_PIXELS = 160
SMALL_PIXELS = 64  # images of fewer pixels a side are shown with sharp edges
CELL, CHARACTER = 24, 6.5  # of the matrix and its labels, in pixels
PLOT = 320  # side of the reliability diagram, in pixels
MAX_LABEL = 22  # characters


def html_of(evaluated: Evaluated) -> str:
    """The page. Reads the files of the mistakes that it shows."""
    document = evaluated.document
    environment = Environment(
        loader=PackageLoader("model_repo.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    matrix, count = _matrix(evaluated)
    mistakes = _mistakes(evaluated)
    return environment.get_template(TEMPLATE).render(
        title=f"{document.model} version {document.version}",
        document=document,
        percent=percent,
        signed=lambda value: f"{100 * value:+.2f} %",
        matrix=matrix,
        matrix_classes=count,
        reliability=_reliability(document.scores.calibration),
        mistakes=mistakes,
        small=all(each["side"] < SMALL_PIXELS for each in mistakes),
    )


def percent(value: float | None) -> str:
    """A fraction for people; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f} %"


def _matrix(evaluated: Evaluated) -> tuple[Markup, int]:
    """The confusion matrix as SVG, and its number of classes."""
    readable = evaluated.predictions.is_readable
    truth = truth_of(evaluated.data)[readable]
    answers = evaluated.predictions.classes[readable, 0]
    chosen = _classes_to_show(truth, answers, len(evaluated.labels))
    position = {int(index): place for place, index in enumerate(chosen)}
    counts = np.zeros((len(chosen), len(chosen)), int)
    for true, answer in zip(truth, answers, strict=True):
        if int(true) in position and int(answer) in position:
            counts[position[int(true)], position[int(answer)]] += 1
    totals = np.bincount(truth, minlength=len(evaluated.labels))[chosen]
    margin = 12 + CHARACTER * max(len(_short(evaluated.labels[index])) for index in chosen)
    side = margin + CELL * len(chosen) + 30
    parts = [
        f'<svg viewBox="0 0 {side} {side}" width="{side}" height="{side}" role="img" '
        'aria-label="confusion matrix">'
    ]
    for row, index in enumerate(chosen):
        label = escape(_short(evaluated.labels[index]))
        middle = margin + CELL * row + CELL * 0.65
        parts.append(f'<text x="{margin - 6}" y="{middle}" text-anchor="end">{label}</text>')
        parts.append(
            f'<text transform="translate({middle},{margin - 6}) rotate(-60)">{label}</text>'
        )
        for column in range(len(chosen)):
            x, y = margin + CELL * column, margin + CELL * row
            is_right = row == column
            parts.append(_cell(x, y, is_right, int(counts[row, column]), int(totals[row])))
    return Markup("".join(parts) + "</svg>"), len(chosen)


def _classes_to_show(
    truth: NDArray[np.int64], answers: NDArray[np.int32], classes: int
) -> NDArray[np.int64]:
    """All classes, or those with the most mistakes, in the order of the labels."""
    if classes <= MAX_MATRIX_CLASSES:
        return np.arange(classes)
    wrong = truth != answers
    mistakes = np.bincount(truth[wrong], minlength=classes)
    mistakes += np.bincount(answers[wrong], minlength=classes)
    images = np.bincount(truth, minlength=classes)
    order = np.lexsort((-images, -mistakes))[:MAX_MATRIX_CLASSES]
    return np.sort(order)


def _cell(x: float, y: float, is_right: bool, count: int, total: int) -> str:
    share = count / total if total else 0.0
    hue = "46,125,50" if is_right else "179,38,30"
    # A single mistake in a large class must be visible.
    strength = 0.15 + 0.85 * share if count else 0.0
    colour = f"rgba({hue},{strength:.2f})" if count else "#f6f7f8"
    text = ""
    if count:
        shade = "#fff" if strength > 0.6 else "#22272e"
        text = (
            f'<text x="{x + CELL / 2}" y="{y + CELL * 0.65}" text-anchor="middle" '
            f'style="fill:{shade};font-size:9px">{count}</text>'
        )
    elif is_right and not total:
        text = f'<circle cx="{x + CELL / 2}" cy="{y + CELL / 2}" r="2" fill="#b0b7bf"/>'
    rectangle = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>'
    return rectangle + text


def _reliability(bins: tuple[CalibrationBin, ...]) -> Markup:
    """Accuracy by confidence as SVG; the width of a bar's line says how many images it has."""
    left, top = 46, 10
    most = max(each.images for each in bins)
    parts = [
        f'<svg viewBox="0 0 {PLOT + left + 20} {PLOT + top + 40}" width="{PLOT + left + 20}" '
        f'height="{PLOT + top + 40}" role="img" aria-label="reliability diagram">',
        f'<rect x="{left}" y="{top}" width="{PLOT}" height="{PLOT}" fill="#f6f7f8"/>',
    ]
    for each in bins:
        height = PLOT * each.accuracy
        width = PLOT * (each.high - each.low)
        opacity = 0.35 + 0.65 * each.images / most
        parts.append(
            f'<rect x="{left + PLOT * each.low + 1:.1f}" y="{top + PLOT - height:.1f}" '
            f'width="{width - 2:.1f}" height="{height:.1f}" fill="#1f5fae" '
            f'fill-opacity="{opacity:.2f}"><title>{each.images} images, confidence '
            f"{each.confidence:.3f}, accuracy {each.accuracy:.3f}</title></rect>"
        )
    parts.append(
        f'<line x1="{left}" y1="{top + PLOT}" x2="{left + PLOT}" y2="{top}" stroke="#59636e" '
        'stroke-dasharray="4 4"/>'
    )
    for tenth in range(0, 11, 2):
        at = PLOT * tenth / 10
        parts.append(
            f'<text x="{left + at}" y="{top + PLOT + 16}" text-anchor="middle">{tenth * 10}</text>'
            f'<text x="{left - 6}" y="{top + PLOT - at + 4}" text-anchor="end">{tenth * 10}</text>'
        )
    parts.append(
        f'<text x="{left + PLOT / 2}" y="{top + PLOT + 34}" text-anchor="middle">'
        "confidence, %; darker bars have more images</text>"
        f'<text transform="translate(12,{top + PLOT / 2}) rotate(-90)" text-anchor="middle">'
        "accuracy, %</text></svg>"
    )
    return Markup("".join(parts))


def _mistakes(evaluated: Evaluated) -> list[dict[str, Any]]:
    """The wrong answers with the highest confidence, with thumbnails."""
    predictions, samples = evaluated.predictions, evaluated.data.samples
    truth = truth_of(evaluated.data)
    wrong = np.flatnonzero(predictions.is_readable & (predictions.classes[:, 0] != truth))
    order = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MAX_MISTAKES]
    found = []
    for index in order:
        path = samples[index].path
        image, side = _thumbnail(path)
        found.append(
            {
                "image": image,
                "side": side,
                "file": path.name,
                "truth": evaluated.labels[truth[index]],
                "answer": evaluated.labels[predictions.classes[index, 0]],
                "confidence": float(predictions.confidence[index]),
            }
        )
    return found


def _thumbnail(path: Path) -> tuple[str, int]:
    """A data URL of the image, and the longer side of the original; empty if it is gone."""
    try:
        with Image.open(path) as image:
            side = max(image.size)
            small = ImageOps.exif_transpose(image)
            small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            file = io.BytesIO()
            small.convert("RGB").save(file, "PNG" if side < SMALL_PIXELS else "JPEG", quality=85)
    except Exception:  # the file was readable before; Pillow raises many types
        return "", 0
    kind = "png" if side < SMALL_PIXELS else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", side


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 3] + "..."
