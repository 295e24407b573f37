"""Takes the parameters of a network out of a checkpoint, and says what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model_repo.checkpoints.file_kinds import SAVE_STATE
from model_repo.checkpoints.fitting import BATCH_COUNTER, Fit, Shapes, best_fit
from model_repo.checkpoints.names import is_harmless
from model_repo.checkpoints.reader import WrongCheckpoint, read_checkpoint, shown
from model_repo.checkpoints.recognition import ALIKE, looks_like
from model_repo.checkpoints.shards import is_part
from model_repo.checkpoints.states import StateDict, find_states, is_plain, top_entries

MAX_ASIDE_SHOWN = 6


class Parameters(NamedTuple):
    """The parameters and buffers of a network by name."""

    tensors: dict[str, Tensor]
    taken: str  # what was taken and what was left aside, in one line
    style: str  # the library whose names they had: "timm", "transformers"; "" for ours


def network_parameters(path: Path, architecture: str, expected: Shapes) -> Parameters:
    """The tensors of a checkpoint for a network, in the shapes `expected`.

    Raises WrongCheckpoint; the message continues a sentence: "net.pth " + "has 7 classes, ...".
    """
    content = read_checkpoint(path)
    try:
        return fitted_parameters(checked_states(content), architecture, expected, content)
    except WrongCheckpoint as error:
        if not is_part(path):
            raise
        raise WrongCheckpoint(
            f"does not fit {architecture}: it is one file of several; give their index, a file "
            "beside it that ends in .index.json"
        ) from error


def fitted_parameters(
    states: Sequence[StateDict], architecture: str, expected: Shapes, content: object = None
) -> Parameters:
    """The tensors for a network out of those that were found in `content`.

    Raises WrongCheckpoint; the message continues a sentence.
    """
    fit = best_fit(states, architecture)
    assert fit is not None, "there are tensors"
    classes = _rows(expected, fit)
    if fit.likeness >= ALIKE and fit.classes not in (None, classes):
        raise WrongCheckpoint(
            f"has {fit.classes} classes, but the labels name {classes}; give a label file with "
            f"{fit.classes} names in the order of the training"
        )
    if problems := _problems(expected, fit):
        wanted = f"{architecture} with {classes} classes"
        if fit.likeness < 1 and (other := looks_like(states, architecture)):
            raise WrongCheckpoint(f"does not fit {wanted}: {other}")
        raise WrongCheckpoint(f"does not fit {wanted}: {'; '.join(problems)}")
    tensors = {name: fit.tensors[name].to(_number_format(name)).contiguous() for name in expected}
    return Parameters(tensors, _taken(content, fit, len(tensors)), fit.style)


def checked_states(content: object) -> list[StateDict]:
    """All places with tensors by name. Raises WrongCheckpoint if there are none."""
    states = find_states(content)
    if states:
        return states
    if isinstance(content, Mapping):
        entries = shown([repr(name) for name in content])
        given = f" but {entries}" if entries else ""
        raise WrongCheckpoint(f"contains no tensors by name{given}; {SAVE_STATE}")
    kind = type(content).__name__
    raise WrongCheckpoint(f"contains a value of type {kind}, not tensors by name; {SAVE_STATE}")


def _number_format(name: str) -> torch.dtype:
    return torch.int64 if name.endswith(BATCH_COUNTER) else torch.float32


def _rows(expected: Shapes, fit: Fit) -> int:
    return int(expected[f"{fit.network.head}.weight"][0])


def _problems(expected: Shapes, fit: Fit) -> list[str]:
    """Describes each kind of difference, with the first names of each."""
    given = fit.tensors
    used = {name: given[name] for name in expected if name in given}
    names_by_kind = {
        "missing": [name for name in expected if name not in given],
        "unknown": fit.unknown(),
        "of another shape": [
            f"{name} {list(tensor.shape)} for {list(expected[name])}"
            for name, tensor in used.items()
            if tensor.shape != expected[name]
        ],
        "sparse, complex, quantised or without values": [
            name for name, tensor in used.items() if not is_plain(tensor)
        ],
        "with numbers that are not finite": [
            name for name, tensor in used.items() if is_plain(tensor) and not _is_finite(tensor)
        ],
    }
    return [
        f"{len(names)} {kind} ({shown(names)})" for kind, names in names_by_kind.items() if names
    ]


def _is_finite(tensor: Tensor) -> bool:
    # torch has no isfinite for numbers of 8 bits.
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return bool(wide.isfinite().all())


def _taken(content: object, fit: Fit, count: int) -> str:
    """ "122 tensors of entry 'model', prefix 'module.'; left aside: epoch, optimizer"."""
    parts = [f"{count} tensors"]
    if fit.state.title:
        parts.append(f" of {fit.state.title}")
    if fit.is_averaged:
        parts.append(" (averaged over the training)")
    if fit.prefix:
        parts.append(f", prefix {fit.prefix!r}")
    if fit.style:
        parts.append(f", names of {fit.style}")
    aside = _left_aside(content, fit)
    parts.append(
        f"; left aside: {shown(aside, MAX_ASIDE_SHOWN)}" if aside else "; nothing left aside"
    )
    return "".join(parts)


def _left_aside(content: object, fit: Fit) -> list[str]:
    """Other entries of the file, and tensors that are not the served network's."""
    entries = fit.state.entries
    aside = [name for name in top_entries(content) if entries and name != entries[0]]
    aside += fit.state.others if not entries or len(entries) > 1 else ()
    aside += _roots(fit.outside)
    training = fit.network.training_only
    aside += _roots([name for name in fit.tensors if training and name.startswith(training)])
    aside += [
        name
        for name in fit.tensors
        if is_harmless(name) and name not in fit.network.shapes and "." not in name
    ]
    return list(dict.fromkeys(aside))


def _roots(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
