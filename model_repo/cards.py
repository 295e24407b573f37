"""Model cards: one TOML file holds every choice about a served model.

    architecture = "resnet50"           # a name from model_repo.architectures
    weights = "https://...-0676ba61.pth"  # source of the parameters, see model_repo.weights
    labels = "imagenet.txt"             # a file in labels/, see model_repo.labels
    objective_ms = 100                  # target latency from request to response
    share = 1                           # part of a shared device: 1 gets twice as much as 0.5

    [input]
    height = 224                        # pixels
    width = 224
    channels = 3                        # 1 grey, 3 red-green-blue
    resize = 256                        # shorter side before the centre crop; 0 resizes both sides
    interpolation = "bilinear"
    mean = [0.485, 0.456, 0.406]        # one for each channel, for pixels on the scale 0 to 1
    std = [0.229, 0.224, 0.225]

    [batch]
    max_batch = 16                      # largest batch of a CPU engine

    [gpu]
    opt_batch = 64                      # batch size that a GPU engine is tuned for
    max_batch = 256                     # largest batch of a GPU engine

Every key is required, so that no choice depends on a default elsewhere. Blanks around a text do not
count. Cards may be saved with a byte-order mark and with any line ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct

from model_repo.architectures.registry import find
from model_repo.labels import read_labels
from server.images.input_spec import InputSpec
from server.repository.manifest import MODEL_NAME, SHARE_RANGE
from server.repository.text import decode_text

CARDS_FOLDER = Path(__file__).parent / "cards"
LABELS_FOLDER = Path(__file__).parent / "labels"
MAX_BATCH = 1024


class CardError(ValueError):
    """A card is missing or wrong. The message names the card and says what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Everything chosen about one served model. Raises ValueError for values out of range."""

    name: str
    architecture: str
    weights: str
    labels: tuple[str, ...]  # class names by index; the network has as many classes
    input: InputSpec
    mean: tuple[float, ...]  # one for each channel, for pixels on the scale 0 to 1
    std: tuple[float, ...]
    max_batch: int
    gpu_opt_batch: int
    gpu_max_batch: int
    objective_ms: float
    share: float
    sha256: str = ""  # of the card's file

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(f"name must match {MODEL_NAME.pattern}, not {self.name!r}")
        channels, height, width = find(self.architecture).input_shape
        if self.input.shape != (height, width, channels):
            given = "x".join(map(str, self.input.shape))
            raise ValueError(
                f"input of {self.architecture} must be {height}x{width}x{channels}, not {given}"
            )
        if not self.weights:
            raise ValueError("weights must not be empty; give the source of the parameters")
        if not self.labels or not all(label.strip() for label in self.labels):
            raise ValueError("labels must be at least one name, and none may be empty")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"input.{name} must be {channels} finite numbers, not {list(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"input.std must be above 0, not {list(self.std)}")
        for name, rows in (("batch", self.max_batch), ("gpu", self.gpu_max_batch)):
            if not 1 <= rows <= MAX_BATCH:
                raise ValueError(f"{name}.max_batch must be 1 to {MAX_BATCH}, not {rows}")
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


class _Input(Struct, frozen=True, forbid_unknown_fields=True):
    height: int
    width: int
    channels: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Batch(Struct, frozen=True, forbid_unknown_fields=True):
    max_batch: int


class _Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    opt_batch: int
    max_batch: int


class _CardFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A card as TOML: its keys and their types."""

    architecture: str
    weights: str
    labels: str
    objective_ms: float
    share: float
    input: _Input
    batch: _Batch
    gpu: _Gpu


def names(folder: Path = CARDS_FOLDER) -> list[str]:
    """The names of all cards, sorted. Skips hidden files, which editors and macOS leave."""
    return sorted(path.stem for path in _visible_files(folder, "*.toml"))


def load(name: str, folder: Path = CARDS_FOLDER, labels: Path = LABELS_FOLDER) -> Card:
    """The card of that name. Raises CardError."""
    if name not in names(folder):
        raise CardError(f"there is no card {name!r}; cards: {', '.join(names(folder)) or 'none'}")
    path = folder / f"{name}.toml"
    content = path.read_bytes()
    try:
        file = msgspec.toml.decode(decode_text(content), type=_CardFile)
        return _card(name, file, labels, sha256(content).hexdigest())
    except msgspec.ValidationError as error:
        keys = ", ".join(_keys(_CardFile))
        raise CardError(f"card {path.name}: {error}. The keys of a card are {keys}") from error
    except ValueError as error:  # not TOML, or a value out of range
        raise CardError(f"card {path.name}: {error}") from error


def _card(name: str, file: _CardFile, labels: Path, digest: str) -> Card:
    return Card(
        name=name,
        architecture=file.architecture.strip(),
        weights=file.weights.strip(),
        labels=_read_labels(labels, file.labels.strip()),
        input=InputSpec(
            height=file.input.height,
            width=file.input.width,
            channels=file.input.channels,
            resize=file.input.resize,
            interpolation=file.input.interpolation.strip(),
        ),
        mean=file.input.mean,
        std=file.input.std,
        max_batch=file.batch.max_batch,
        gpu_opt_batch=file.gpu.opt_batch,
        gpu_max_batch=file.gpu.max_batch,
        objective_ms=file.objective_ms,
        share=file.share,
        sha256=digest,
    )


def _read_labels(folder: Path, name: str) -> tuple[str, ...]:
    files = sorted(path.name for path in _visible_files(folder, "*.txt"))
    if name not in files:
        raise ValueError(
            f"labels must be a file in {folder.name}/, one of {', '.join(files) or 'none'}, "
            f"not {name!r}"
        )
    return read_labels(folder / name)


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]


def _keys(table: type[Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(table):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            yield from _keys(field.type, f"{field.name}.")
        else:
            yield prefix + field.name
