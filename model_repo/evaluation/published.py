"""Checks the accuracy of engines that are about to be published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_repo.cards import Card
from model_repo.compile import loaded_engine
from model_repo.evaluation.dataset import DataError, DataSet, read_data
from model_repo.evaluation.gate import Gate, check_gate
from model_repo.evaluation.local import (
    Progress,
    opened_engine,
    predict_eagerly,
    predict_with_engine,
)
from model_repo.evaluation.predictions import Predictions
from model_repo.export import ServedNetwork
from model_repo.progress import BuildProgress
from server.engines.base import backend
from server.repository import reader
from server.repository.contents import VersionEntry, list_versions
from server.repository.manifest import EngineRecord, InvalidVersion
from server.repository.serving_config import read_serving_config


def read_gate_data(gate: Gate, card: Card) -> DataSet:
    """The labelled images of a gate. Raises DataError."""
    if card.activation != "softmax":
        raise DataError(
            f"--data needs a model with one class per image (softmax); {card.name} has "
            f"{card.activation}"
        )
    return read_data(gate.data, card.labels)


def check_accuracy(
    gate: Gate,
    repo: Path,
    card: Card,
    served: ServedNetwork,
    staged: Path,
    records: Sequence[EngineRecord],
    progress: BuildProgress,
) -> None:
    """Measures each staged engine that can run here. Raises GateClosed, DataError, EngineFailure.

    The references are eager PyTorch and the version that a server serves now.
    """
    data = read_gate_data(gate, card)
    runnable = [record for record in records if not backend(record.backend).incompatibility(record)]
    if not runnable:
        raise DataError(
            f"--data {gate.data}: no engine of the build can run on this machine, so its accuracy "
            "can't be measured; build on a machine that can, or without --data"
        )

    def advance(done: int) -> None:
        progress.advance(done, len(data.samples))

    references = [predict_eagerly(served, card.input, data.samples, advance)]
    current = served_version(repo, card.name)
    if current is not None:
        try:
            references.append(_predict_published(current, card, data, advance))
        except InvalidVersion as error:
            progress.warn(f"not compared with version {current.version}: {error}")
    for record in runnable:
        compiler = backend(record.backend)
        with loaded_engine(compiler, staged, record, card.input.shape) as engine:
            found = predict_with_engine(engine, card.input, data.samples, record.name, advance)
        check_gate(gate, data, card.labels, found, tuple(references), progress.tell)
    for record in records:
        if record not in runnable:
            progress.warn(
                f"{record.name} cannot run on this machine; its accuracy was not measured"
            )


def served_version(repo: Path, model: str) -> VersionEntry | None:
    """The version that gets most requests: the one labelled stable, else the newest valid one."""
    entries = list_versions(repo) if repo.is_dir() else []
    valid = [entry for entry in entries if entry.model == model and entry.manifest is not None]
    try:
        stable = read_serving_config(repo / model).labels.get("stable")
    except (InvalidVersion, OSError):
        stable = None
    labelled = [entry for entry in valid if entry.version == stable]
    return next(iter(labelled or valid), None)


def _predict_published(
    entry: VersionEntry, card: Card, data: DataSet, advance: Progress
) -> Predictions:
    """Raises InvalidVersion if the version can't be compared."""
    manifest = entry.manifest
    assert manifest is not None
    if reader.open_version(entry.folder, manifest).labels != card.labels:
        raise InvalidVersion("it has other classes")
    with opened_engine(entry.folder, manifest) as (engine, name):
        source = f"version {entry.version}, which is served ({name})"
        return predict_with_engine(engine, manifest.input.spec(), data.samples, source, advance)
