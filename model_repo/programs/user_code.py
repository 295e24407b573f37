"""A user's own architecture: a function in a Python file that makes the network.

    architecture = "my_net.py:build"      # build(classes) returns a torch.nn.Module

The code runs in the build only, never in a server, and only if the user allows it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_repo.checkpoints.names import is_harmless, prefixes, unwrapped
from model_repo.checkpoints.parameters import checked_states
from model_repo.checkpoints.reader import WrongCheckpoint, read_checkpoint, shown

REFUSAL = "is Python code; build with --allow-code if you trust it"


def make_network(architecture: str, classes: int) -> nn.Module:
    """Calls the function of "FILE.py:FUNCTION". Raises WrongCheckpoint.

    The message continues a sentence that names the file. The file may import others beside it.
    """
    name, _, function = architecture.rpartition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise WrongCheckpoint("does not exist")
    made = _called(_function(path, function), classes, path)
    if not isinstance(made, nn.Module):
        raise WrongCheckpoint(
            f"{function}({classes}) returned {type(made).__name__}; a torch.nn.Module is needed"
        )
    return made.eval()


def fill(network: nn.Module, checkpoint: Path) -> str:
    """Loads a checkpoint into a network. Returns what was taken. Raises WrongCheckpoint."""
    expected = network.state_dict()
    best: tuple[int, dict[str, Tensor], str] = (-1, {}, "")
    for state in checked_states(read_checkpoint(checkpoint)):
        tensors = {unwrapped(name): tensor for name, tensor in state.tensors.items()}
        for prefix in {"": None, **dict.fromkeys(prefixes(tensors, next(iter(expected))))}:
            inside = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            matched = sum(
                name in inside and inside[name].shape == tensor.shape
                for name, tensor in expected.items()
            )
            if matched > best[0]:
                best = matched, inside, state.title + (f", prefix {prefix!r}" if prefix else "")
    _, found, where = best
    _check(expected, found)
    network.load_state_dict({name: found.get(name, own) for name, own in expected.items()})
    return f"{len(expected)} tensors{' of ' + where.lstrip(', ') if where else ''}"


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Every tensor of the network needs one of its shape, and none may be left over."""
    missing = [name for name in expected if name not in found and not is_harmless(name)]
    unknown = [name for name in found if name not in expected and not is_harmless(name)]
    shapes = [
        f"{name} {list(found[name].shape)} for {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    problems = [f"{len(each)} {kind} ({shown(each)})" for kind, each in kinds.items() if each]
    if problems:
        raise WrongCheckpoint(f"does not fit the network: {'; '.join(problems)}")


def _function(path: Path, name: str) -> Any:
    if not name:
        raise WrongCheckpoint(f'needs the name of a function: "{path.name}:build"')
    module_name = f"convserve_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise WrongCheckpoint("can't be imported; it must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look it up
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise WrongCheckpoint(f"fails: {_last_line(error, path)}") from error
    finally:
        sys.path.remove(str(path.absolute().parent))
    found = getattr(module, name, None)
    if not callable(found):
        known = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name
        ]
        raise WrongCheckpoint(
            f"has no function {name!r}; it has {', '.join(known[:6]) or 'no functions'}"
        )
    return found


def _called(function: Any, classes: int, path: Path) -> object:
    try:
        torch.manual_seed(0)  # parameters that the checkpoint does not set are always the same
        return function(classes)
    except Exception as error:
        raise WrongCheckpoint(
            f"{function.__name__}({classes}) fails: {_last_line(error, path)}"
        ) from error


def _last_line(error: Exception, path: Path) -> str:
    """The error and the last line of the user's file that led to it."""
    message = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if isinstance(error, SyntaxError):
        return f"{message} (line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == path.name
    ]
    return f"{message} (line {frames[-1].lineno}: {frames[-1].line})" if frames else message
