"""Model cards: one TOML file says all that is chosen about a served model.

    architecture = "resnet50"           # a name of model_repo.architectures
    weights = "https://...-0676ba61.pth"  # where parameters come from, see model_repo.weights
    labels = "imagenet.txt"             # class names in labels/, one a line, by index
    objective_ms = 100                  # what its users hope to wait, from request to answer
    share = 1                           # of a device it has to share: twice as much as 0.5 gets

    [input]
    height = 224                        # pixels that the network takes
    width = 224
    channels = 3                        # 1 grey, 3 red-green-blue
    resize = 256                        # shorter side before the centre crop; 0 resizes both
    interpolation = "bilinear"
    mean = [0.485, 0.456, 0.406]        # a channel each, of pixels on the scale 0 to 1
    std = [0.229, 0.224, 0.225]

    [batch]
    max_batch = 16                      # most rows that an engine on a CPU takes at once

    [gpu]
    opt_batch = 64                      # rows that an engine on a GPU is tuned for
    max_batch = 256                     # most rows that it takes at once

Every key is required, so that nothing about a model depends on a default elsewhere.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from model_repo import architectures
from server.images.input_spec import InputSpec
from server.repository.manifest import SHARE_RANGE

CARDS = Path(__file__).parent / "cards"
LABELS_FOLDER = Path(__file__).parent / "labels"

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")  # it becomes a folder, a label and an argument

KEYS: dict[str, type] = {
    "architecture": str,
    "weights": str,
    "labels": str,
    "objective_ms": float,
    "share": float,
    "input": dict,
    "batch": dict,
    "gpu": dict,
}
INPUT_KEYS: dict[str, type] = {
    "height": int,
    "width": int,
    "channels": int,
    "resize": int,
    "interpolation": str,
    "mean": list,
    "std": list,
}
BATCH_KEYS: dict[str, type] = {"max_batch": int}
GPU_KEYS: dict[str, type] = {"opt_batch": int, "max_batch": int}
MAX_BATCH = 1024


class CardError(ValueError):
    """A card is missing or wrong; the message names the card and says what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is chosen about one served model. Raises ValueError for what can't be served."""

    name: str
    architecture: str
    weights: str
    labels: tuple[str, ...]  # names of the classes by index; their number is the network's
    input: InputSpec
    mean: tuple[float, ...]  # a channel each, on the scale 0 to 1
    std: tuple[float, ...]
    max_batch: int
    gpu_opt_batch: int
    gpu_max_batch: int
    objective_ms: float
    share: float
    sha256: str = ""  # of the card's file

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must match {NAME.pattern}, not {self.name!r}")
        channels, height, width = architectures.find(self.architecture).input_shape
        if self.input.shape != (height, width, channels):
            given = "x".join(map(str, self.input.shape))
            raise ValueError(
                f"{self.architecture} takes {height}x{width}x{channels} pixels, not {given}"
            )
        if not self.weights:
            raise ValueError("weights must say where parameters come from, not be empty")
        if not self.labels or not all(label.strip() for label in self.labels):
            raise ValueError("labels must name every class, and at least one")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be {channels} finite numbers, not {list(values)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {list(self.std)}")
        for where, rows in (("", self.max_batch), ("gpu.", self.gpu_max_batch)):
            if not 1 <= rows <= MAX_BATCH:
                raise ValueError(f"{where}max_batch must be 1 to {MAX_BATCH}, not {rows}")
        if not 1 <= self.gpu_opt_batch <= self.gpu_max_batch:
            raise ValueError(
                f"gpu.opt_batch must be 1 to gpu.max_batch, {self.gpu_max_batch}, "
                f"not {self.gpu_opt_batch}"
            )
        if not (math.isfinite(self.objective_ms) and self.objective_ms > 0):
            raise ValueError(f"objective_ms must be above 0, not {self.objective_ms}")
        if not SHARE_RANGE[0] <= self.share <= SHARE_RANGE[1]:
            raise ValueError(
                f"share must be {SHARE_RANGE[0]:g} to {SHARE_RANGE[1]:g}, not {self.share}"
            )

    @property
    def classes(self) -> int:
        return len(self.labels)


def names(folder: Path = CARDS) -> list[str]:
    """The names of all cards, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: Path = CARDS, labels: Path = LABELS_FOLDER) -> Card:
    """The card of that name. Raises CardError."""
    if name not in names(folder):
        raise CardError(
            f"there is no card {name!r}; there are {', '.join(names(folder)) or 'none'}"
        )
    path = folder / f"{name}.toml"
    content = path.read_bytes()
    try:
        table = tomllib.loads(content.decode())
        return _card(name, table, labels, sha256(content).hexdigest())
    except ValueError as error:  # tomllib's and the decoder's are ValueErrors too
        raise CardError(f"card {path.name}: {error}") from error


def _card(name: str, table: Mapping[str, Any], labels: Path, digest: str) -> Card:
    top = _checked("", table, KEYS)
    pixels = _checked("input.", top["input"], INPUT_KEYS)
    batch = _checked("batch.", top["batch"], BATCH_KEYS)
    gpu = _checked("gpu.", top["gpu"], GPU_KEYS)
    return Card(
        name=name,
        architecture=top["architecture"],
        weights=top["weights"],
        labels=_label_names(labels, top["labels"]),
        input=InputSpec(
            height=pixels["height"],
            width=pixels["width"],
            channels=pixels["channels"],
            resize=pixels["resize"],
            interpolation=pixels["interpolation"],
        ),
        mean=_numbers("input.mean", pixels["mean"]),
        std=_numbers("input.std", pixels["std"]),
        max_batch=batch["max_batch"],
        gpu_opt_batch=gpu["opt_batch"],
        gpu_max_batch=gpu["max_batch"],
        objective_ms=top["objective_ms"],
        share=top["share"],
        sha256=digest,
    )


def _checked(where: str, table: Mapping[str, Any], keys: Mapping[str, type]) -> dict[str, Any]:
    """The table's values, whole numbers made floats where a float is meant."""
    unknown, missing = sorted(table.keys() - keys.keys()), sorted(keys.keys() - table.keys())
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}; there are {', '.join(keys)}")
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing")
    values = {}
    for key, kind in keys.items():
        value = table[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # not isinstance: a bool is no int here
            raise ValueError(f"{where}{key} must be of type {kind.__name__}, not {value!r}")
        values[key] = value
    return values


def _numbers(where: str, values: list[Any]) -> tuple[float, ...]:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{where} must be numbers, not {values!r}")
    return tuple(map(float, values))


def _label_names(folder: Path, name: str) -> tuple[str, ...]:
    files = sorted(path.name for path in folder.glob("*.txt"))
    if name not in files:
        raise ValueError(f"labels {name!r} is no file of {folder.name}/; there are {files}")
    return tuple((folder / name).read_text(encoding="utf-8").splitlines())
