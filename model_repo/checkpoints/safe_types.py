"""The types that may stand beside the tensors in a checkpoint.

Training scripts store their options, numbers of epochs and accuracies there. All types here only
hold values: creating them runs no code of the file. torch refuses every other type.

Some packages keep options in containers of their own. Nothing of these packages is imported: a
plain dictionary takes the place of such a container, because nobody reads it.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import types
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy._core import multiarray


def _dictionary(*_: object) -> dict[Any, Any]:
    """In place of defaultdict: torch sets items of plain dictionaries only."""
    return {}


def _no_bytes(*_: object) -> bytes:
    """Protocol 2 writes only b"" with this name; bytes(10**12) would take all memory."""
    return b""


TYPES: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "builtins.bool": bool,
    "builtins.bytes": _no_bytes,
    "builtins.dict": dict,
    "builtins.float": float,
    "builtins.frozenset": frozenset,
    "builtins.int": int,
    "builtins.list": list,
    "builtins.str": str,
    "builtins.tuple": tuple,
    "collections.defaultdict": _dictionary,
    "datetime.date": datetime.date,
    "datetime.datetime": datetime.datetime,
    "datetime.time": datetime.time,
    "datetime.timedelta": datetime.timedelta,
    "datetime.timezone": datetime.timezone,
    "decimal.Decimal": decimal.Decimal,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "torch.torch_version.TorchVersion": str,
    "types.SimpleNamespace": types.SimpleNamespace,
    "uuid.UUID": uuid.UUID,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    TYPES[f"{_module}.scalar"] = multiarray.scalar
    TYPES[f"{_module}._reconstruct"] = multiarray._reconstruct
for _module in ("pathlib", "pathlib._local"):  # a path of Windows cannot exist on Linux
    for _name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
        TYPES[f"{_module}.{_name}"] = PurePosixPath
    for _name in ("WindowsPath", "PureWindowsPath"):
        TYPES[f"{_module}.{_name}"] = PureWindowsPath
# numpy.dtype creates values of these types, and torch asks for each of them.
NUMPY_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "U1", "S1")
for _kind in NUMPY_KINDS:
    _type = type(np.dtype(_kind))
    TYPES[f"numpy.dtypes.{_type.__name__}"] = _type

# Packages whose containers hold options.
OPTIONS = (
    *("omegaconf.", "yacs.config.", "easydict.", "addict.addict.", "ml_collections.config_dict."),
    *("mmengine.config.", "mmcv.utils.config.", "fvcore.common.config.", "typing.Any"),
    *("pytorch_lightning.utilities.parsing.AttributeDict",),
    *("lightning.pytorch.utilities.parsing.AttributeDict",),
    *("lightning.fabric.utilities.data.AttributeDict",),
    *("lightning_fabric.utilities.data.AttributeDict",),
)


def allowed(names: Iterable[str]) -> list[tuple[Callable[..., Any], str]]:
    """What torch.serialization.safe_globals needs to load a pickle that has these names."""
    found = dict(TYPES)
    found |= {name: OrderedDict for name in names if name.startswith(OPTIONS)}
    return [(kind, name) for name, kind in found.items()]


def is_allowed(name: str) -> bool:
    return name in TYPES or name.startswith(OPTIONS)
