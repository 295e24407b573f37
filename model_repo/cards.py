"""Model cards: one TOML file holds every choice about a served model.

    architecture = "resnet50"           # a name from model_repo.architectures
    weights = "https://...-0676ba61.pth"  # source of the parameters, see model_repo.weights
    labels = "imagenet.txt"             # a label file or a list of names, see card_files.labels
    objective_ms = 100                  # target latency from request to response
    share = 1                           # part of a shared device: 1 gets twice as much as 0.5
    activation = "softmax"              # or "sigmoid", if an image may have several classes
    top_k = 10                          # most classes that a request can get
    output = ""                         # which output of an ONNX file has the classes, if several

    [input]
    height = 224                        # pixels
    width = 224
    channels = 3                        # 1 grey, 3 red-green-blue
    resize = 256                        # shorter side before the centre crop, "exact", "letterbox"
    interpolation = "bilinear"
    mean = [0.485, 0.456, 0.406]        # one for each channel, for pixels on the scale 0 to 1
    std = [0.229, 0.224, 0.225]
    scale = 1                           # or 255, if mean and std are for pixels from 0 to 255
    channel_order = "rgb"               # or "bgr", if the network takes blue first
    antialias = true                    # whether images are smoothed when they get smaller
    fill = 0                            # of a letterbox, 0 to 255

    [batch]
    max_batch = 16                      # largest batch of a CPU engine

    [gpu]
    opt_batch = 64                      # batch size that a GPU engine is tuned for
    max_batch = 256                     # largest batch of a GPU engine

A card with `base = "resnet50"` takes everything that it does not say from that card. Without a base
every key is required that could change an answer and has no single usual value. Blanks around a
text do not count. Cards may be saved with a byte-order mark and with any line ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec

from model_repo.architectures.registry import find
from model_repo.card_files.labels import check_names, read_labels
from model_repo.card_files.schema import InputTable
from model_repo.card_files.sources import (
    CardSource,
    JoinedCard,
    all_keys,
    is_network_file,
    join,
    network_path,
)
from server.images.input_spec import InputSpec
from server.repository.manifest import MODEL_NAME, SHARE_RANGE, Activation

CARDS_FOLDER = Path(__file__).parent / "cards"
LABELS_FOLDER = Path(__file__).parent / "labels"
MAX_BATCH = 1024
DEFAULT_TOP_K = 10
CHANNEL_ORDERS = ("rgb", "bgr")
SCALES = (1.0, 255.0)


class CardError(ValueError):
    """A card is missing or wrong. The message names the card and says what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Everything chosen about one served model. Raises ValueError for values out of range."""

    name: str
    architecture: str  # a name, or the absolute path of a file: "/x/net.onnx", "/x/net.py:build"
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
    channel_order: str = "rgb"  # of the network, of `mean` and of `std`; callers always send RGB
    activation: Activation = "softmax"
    own_top_k: int = 0  # 0: DEFAULT_TOP_K, or all classes if there are fewer
    output: str = ""  # of an ONNX file; empty: the only one that fits the labels
    sha256: str = ""  # of the card's file
    notes: tuple[str, ...] = ()  # what reading it had to decide, for the user to know

    def __post_init__(self) -> None:
        if not MODEL_NAME.fullmatch(self.name):
            raise ValueError(
                f"name must match {MODEL_NAME.pattern}, not {self.name!r}; rename the card, "
                'or give it another name with name = "..."'
            )
        if self.network_file is None:
            channels, height, width = self.input.channels, self.input.height, self.input.width
            if reason := find(self.architecture).why_not(channels, height, width):
                raise ValueError(f"input of {self.architecture} {reason}")
        if not self.weights:
            raise ValueError("weights must not be empty; give the source of the parameters")
        if not self.labels or not all(label.strip() for label in self.labels):
            raise ValueError("labels must be at least one name, and none may be empty")
        self._check_output()
        self._check_pixels()
        self._check_serving()

    @property
    def classes(self) -> int:
        return len(self.labels)

    @property
    def top_k(self) -> int:
        """Most classes that a request can get."""
        return self.own_top_k or min(DEFAULT_TOP_K, self.classes)

    @property
    def network_file(self) -> Path | None:
        """The file that stands for the architecture; None for one of ours."""
        if not is_network_file(self.architecture):
            return None
        return Path(network_path(self.architecture)).expanduser()

    def _check_output(self) -> None:
        if self.activation not in get_args(Activation):
            names = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {names}, not {self.activation!r}")
        if not 0 <= self.own_top_k <= self.classes:
            raise ValueError(
                f"top_k must be 1 to {self.classes}, the classes, not {self.own_top_k}"
            )

    def _check_pixels(self) -> None:
        channels = self.input.channels
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"input.{name} must be {channels} finite numbers, not {list(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"input.std must be above 0, not {list(self.std)}")
        if self.channel_order not in CHANNEL_ORDERS:
            names = ", ".join(CHANNEL_ORDERS)
            raise ValueError(
                f"input.channel_order must be one of {names}, not {self.channel_order!r}"
            )
        if self.channel_order == "bgr" and channels == 1:
            raise ValueError("input.channel_order bgr needs 3 channels, not 1")

    def _check_serving(self) -> None:
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


def names(folder: Path = CARDS_FOLDER) -> list[str]:
    """The names of all cards, sorted. Skips hidden files, which editors and macOS leave."""
    return sorted(path.stem for path in _visible_files(folder, "*.toml"))


def is_card_path(text: str) -> bool:
    """Whether a card is given by its path, and not by the name of one of ours."""
    return "/" in text or text.endswith(".toml")


def load(card: str | CardSource, folder: Path = CARDS_FOLDER, labels: Path = LABELS_FOLDER) -> Card:
    """The card with that name in `folder`, with that path, or with that content.

    A label file is searched beside the card, then in `labels`. Raises CardError.
    """
    find_base = partial(_find_base, folder=folder)
    source = card if isinstance(card, CardSource) else _find(card, Path(), folder)
    try:
        joined = join(source, find_base)
        return _card(Path(source.title).stem, joined, labels)
    except msgspec.ValidationError as error:
        raise CardError(
            f"card {source.title}: {error}. The keys of a card are {all_keys()}"
        ) from error
    except RecursionError:
        raise CardError(f"card {source.title}: tables or lists in it are too deep") from None
    except ValueError as error:  # not TOML, or a value out of range
        prefix = "" if isinstance(error, CardError) else f"card {source.title}: "
        raise CardError(f"{prefix}{error}") from error


def _find(card: str, beside: Path, folder: Path) -> CardSource:
    """The file of a card. Raises CardError."""
    if is_card_path(card):
        path = beside / Path(card).expanduser()
        try:
            return CardSource(path.name, path.absolute().parent, path.read_bytes())
        except OSError as error:
            raise CardError(f"card {path} can't be read: {error.strerror}") from None
    if card not in names(folder):
        raise CardError(
            f"there is no card {card!r}; cards: {', '.join(names(folder)) or 'none'}. "
            "For a card of your own give its path, for example ./NAME.toml"
        )
    return CardSource(f"{card}.toml", folder, (folder / f"{card}.toml").read_bytes())


def _find_base(base: str, beside: Path, folder: Path) -> CardSource:
    try:
        return _find(base, beside, folder)
    except CardError as error:
        raise ValueError(f"base: {error}") from None


def _card(name: str, joined: JoinedCard, labels: Path) -> Card:
    file = joined.file
    spec, mean, std = _input(file.input)
    return Card(
        name=file.name or name,
        architecture=file.architecture,
        weights=file.weights,
        labels=_labels(file.labels, labels),
        input=spec,
        mean=mean,
        std=std,
        max_batch=file.batch.max_batch,
        gpu_opt_batch=file.gpu.opt_batch,
        gpu_max_batch=file.gpu.max_batch,
        objective_ms=file.objective_ms,
        share=file.share,
        channel_order=file.input.channel_order,
        activation=file.activation,  # type: ignore[arg-type]  # Card checks it
        own_top_k=file.top_k,
        output=file.output,
        sha256=joined.sha256,
        notes=joined.notes,
    )


def _input(table: InputTable) -> tuple[InputSpec, tuple[float, ...], tuple[float, ...]]:
    """The input, its mean and its standard deviation."""
    if table.scale not in SCALES:
        raise ValueError(f"input.scale must be 1 or 255, not {table.scale:g}")
    if isinstance(table.resize, str) and table.resize not in ("exact", "letterbox"):
        raise ValueError(
            "input.resize must be the shorter side in pixels, exact or letterbox, "
            f"not {table.resize!r}"
        )
    spec = InputSpec(
        height=table.height,
        width=table.width,
        channels=table.channels,
        resize=table.resize if isinstance(table.resize, int) else 0,
        interpolation=table.interpolation,
        antialias=table.antialias,
        letterbox=table.resize == "letterbox",
        fill=table.fill if isinstance(table.fill, tuple) else (table.fill,),
    )
    scaled: Any = (tuple(value / table.scale for value in each) for each in (table.mean, table.std))
    mean, std = scaled
    return spec, mean, std


def _labels(given: str | Sequence[str], folder: Path) -> tuple[str, ...]:
    """Class names from a list, from a label file, or from one of ours with that name."""
    if not isinstance(given, str):
        return check_names(given)
    path = Path(given).expanduser() if "/" in given else folder / given
    if not given or not path.is_file():
        ours = ", ".join(sorted(each.name for each in _visible_files(folder, "*.txt"))) or "none"
        raise ValueError(
            f"labels must be a list of names or a label file; there is no file {given!r} "
            f"(ours: {ours})"
        )
    return read_labels(path)


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]
