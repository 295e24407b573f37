"""Loads TorchScript programs: whole networks, with their code.

The code of the program runs when it is loaded, so the user must allow it.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_repo.checkpoints.file_kinds import SAVE_STATE
from model_repo.checkpoints.reader import WrongCheckpoint

REFUSAL = (
    "is a TorchScript program, which is code; build with --allow-code if you trust it, or load it "
    f"with torch.jit.load where it was trained and {SAVE_STATE}"
)
# Largest difference of two logits, relative to the largest logit, of one network computed twice.
MAX_DIFFERENCE = 1e-3


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_program(path: Path) -> nn.Module:
    """Loads a program; its code can run from now on. Raises WrongCheckpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the format is deprecated, but people have it
            jit: Any = torch.jit
            program: nn.Module = jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # of the library, or of the program's own code
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WrongCheckpoint(f"cannot be loaded by torch.jit.load: {reason[-1]:.200}") from error
    for parameter in program.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            return program.float()
    return program


def logits(program: nn.Module, images: Tensor, *, several: bool = False) -> Tensor:
    """[N, C, H, W] normalised -> [N, classes]. Raises WrongCheckpoint if it does not classify.

    With `several`, it may return a tuple, as torchvision's GoogLeNet does; its first value counts.
    """
    try:
        with torch.inference_mode():
            answer = program(images)
    except Exception as error:  # the program's own code
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WrongCheckpoint(
            f"fails with images of {list(images.shape[1:])}: {reason[-1]:.200}"
        ) from error
    if several and isinstance(answer, tuple) and answer:
        answer = answer[0]
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != len(images):
        given = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise WrongCheckpoint(f"returns {given}; a classifier returns [{len(images)}, classes]")
    return answer.float()


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two networks gave the same logits, up to rounding."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= MAX_DIFFERENCE * one.abs().max())
