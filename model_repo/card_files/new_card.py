"""Writes a card for a checkpoint: recognises the network and the number of classes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_repo import cards
from model_repo.card_files.labels import read_labels
from model_repo.checkpoints.fitting import Fit
from model_repo.checkpoints.parameters import checked_states
from model_repo.checkpoints.reader import WrongCheckpoint, read_checkpoint
from model_repo.checkpoints.recognition import looks_like, recognise

# Label files that training scripts leave beside a checkpoint.
USUAL_LABELS = ("labels", "classes", "class_names", "class_indices", "label_names", "config")
ENDINGS = (".txt", ".json", ".csv")

TEXT = """\
# {title}: {architecture} with {classes} classes, from {file}.
# docs/models.md explains every key. Remove the "# " before a line to change its value.
base = "{architecture}" # gives everything that is not said here
weights = {weights} # relative to this card
labels = {labels} # {about_labels}

# activation = "sigmoid" # if an image may have several classes
# top_k = {top_k} # most classes that a request can get
# objective_ms = {objective_ms:g} # latency objective

# How the images were prepared in the training. These are the values of {architecture}.
# [input]
# height = {height}
# width = {width}
# resize = {resize} # shorter side before the centre crop, "exact" or "letterbox"
# interpolation = "{interpolation}"
# mean = {mean}
# std = {std}
# channel_order = "rgb" # "bgr", if the images came from OpenCV and were not converted
# antialias = true # false, if they were resized as tensors, or by OpenCV, Keras or TensorFlow
"""


class NewCardError(Exception):
    """The card cannot be written. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NewCard:
    """What was written."""

    path: Path
    architecture: str
    classes: int
    labels: str
    labels_exist: bool


def write_card(path: Path, checkpoint: Path, *, force: bool = False) -> NewCard:
    """Writes a commented card for a checkpoint. Raises NewCardError.

    An existing card is kept, unless `force` is set.
    """
    if path.suffix != ".toml":
        raise NewCardError(f"--new-card {path} must end in .toml")
    if path.exists() and not force:
        raise NewCardError(f"{path} exists already; choose another name, or add --force")
    if not checkpoint.is_file():
        raise NewCardError(f"there is no checkpoint {checkpoint}; give its file with --from")
    fit = _recognised(checkpoint)
    classes = fit.classes
    if classes is None:
        raise NewCardError(
            f"{checkpoint} is {fit.network.architecture} without a last layer, and cannot "
            "classify; train one, or give the code of yours as the architecture"
        )
    labels = _labels_beside(path, checkpoint, classes)
    name = str(labels) if labels else path.with_suffix(".txt").name
    text = _text(path, checkpoint, fit.network.architecture, classes, name, found=bool(labels))
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise NewCardError(f"{path} cannot be written: {error.strerror}") from None
    return NewCard(path, fit.network.architecture, classes, name, bool(labels))


def _recognised(checkpoint: Path) -> Fit:
    try:
        states = checked_states(read_checkpoint(checkpoint))
    except WrongCheckpoint as error:
        raise NewCardError(f"{checkpoint} {error}") from error
    fit = recognise(states)
    if fit is None:
        raise NewCardError(f"{checkpoint} is not recognised: {looks_like(states, '')}")
    return fit


def _labels_beside(card: Path, checkpoint: Path, classes: int) -> Path | None:
    """A label file with that many names, relative to the card."""
    for path in _candidates(card, checkpoint):
        try:
            if path.is_file() and len(read_labels(path)) == classes:
                return _relative(path, card)
        except ValueError:
            continue
    return None


def _candidates(card: Path, checkpoint: Path) -> Iterator[Path]:
    for folder in dict.fromkeys((card.absolute().parent, checkpoint.absolute().parent)):
        for stem in dict.fromkeys((card.stem, checkpoint.stem, *USUAL_LABELS)):
            for ending in ENDINGS:
                yield folder / f"{stem}{ending}"


def _relative(path: Path, card: Path) -> Path:
    return Path(os.path.relpath(path.absolute(), card.absolute().parent))


def _text(
    path: Path, checkpoint: Path, architecture: str, classes: int, labels: str, *, found: bool
) -> str:
    base = cards.load(architecture)
    order = f"{classes} names in the order of the training"
    weights = _relative(checkpoint, path).as_posix()
    plain = "." in weights or "/" in weights  # otherwise it could be the name of a source
    return TEXT.format(
        title=path.stem,
        architecture=architecture,
        classes=classes,
        file=checkpoint.name,
        weights=json.dumps(weights if plain else f"file:{weights}", ensure_ascii=False),
        labels=json.dumps(labels, ensure_ascii=False),
        about_labels=order if found else f"write this file: {order}, one per line",
        top_k=min(cards.DEFAULT_TOP_K, classes),
        objective_ms=base.objective_ms,
        height=base.input.height,
        width=base.input.width,
        resize=base.input.resize or '"exact"',
        interpolation=base.input.interpolation,
        mean=list(base.mean),
        std=list(base.std),
    )
