"""The manifest of a version: what it is, what it was made from, and the checksums of its files.

    <root>/<model>/<version>/manifest.json    this record
                             model.onnx       the exported network
                             golden.npz       inputs, and the answers of eager float32 PyTorch
                             labels.txt       one class name a line
                             <engine files>   one or more for each engine
    <root>/<model>/serving.json               which versions to serve; see serving_config.py

A version number is an integer. A published version never changes, except that engines can be added
to it. An invalid version is reported with a reason, and does not keep other versions from serving.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from server.images.input_spec import InputSpec

MANIFEST_FORMAT = 1  # of manifest.json; readers reject other formats
MANIFEST_FILE = "manifest.json"
ONNX_FILE = "model.onnx"
GOLDEN_FILE = "golden.npz"
LABELS_FILE = "labels.txt"
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,17}")  # less than 2**63, so it fits every wire format
MAX_BATCH_BYTES = 2 << 30  # pixels of the largest batch
SHARE_RANGE = (0.01, 100.0)  # weights of models that share a device

Text = Annotated[str, Meta(max_length=4096)]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}\Z")]
FileName = Annotated[  # neither hidden nor in another folder
    str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Side = Annotated[int, Meta(ge=1, le=1 << 16)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
# What the probabilities mean. softmax: an image has one class, and they sum to 1. sigmoid: each
# class is decided by itself, and an image may have several classes or none.
Activation = Literal["softmax", "sigmoid"]


class InvalidVersion(Exception):
    """A version, or its serving.json, can't be used; the message says why."""


class FileRecord(Struct, frozen=True, kw_only=True):
    """Size and checksum of a file when it was published."""

    name: FileName
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class WeightsRecord(Struct, frozen=True, kw_only=True):
    """Origin of the parameters."""

    source: Text  # of the build: "digits", "https://...", "random:0", "file:NAME" without folders
    sha256: Sha256  # of the checkpoint file, or of the parameters if there is no file
    trained: bool
    note: Text = ""  # for example the accuracy


class InputRecord(Struct, frozen=True, kw_only=True):
    """The input shape and the way to resize an image to it; see InputSpec.

    Also what the graph does with the pixels. The server needs only the first part, because callers
    always send red, green, blue.
    """

    height: Side
    width: Side
    channels: Literal[1, 3]
    resize: Annotated[int, Meta(ge=0, le=1 << 16)]
    interpolation: Word
    antialias: bool = True
    letterbox: bool = False
    fill: Annotated[tuple[int, ...], Meta(min_length=1, max_length=3)] = (0,)
    # In the graph. Empty in versions of older builds.
    channel_order: Literal["rgb", "bgr", ""] = ""
    mean: tuple[float, ...] = ()  # in channel_order, for pixels on the scale 0 to 1
    std: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        spec: InputSpec,
        channel_order: str = "",
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
    ) -> InputRecord:
        graph = {"channel_order": channel_order, "mean": mean, "std": std}
        return msgspec.convert(asdict(spec) | graph, cls)

    def spec(self) -> InputSpec:
        """The part that the server needs. Raises ValueError."""
        return InputSpec(**{each.name: getattr(self, each.name) for each in fields(InputSpec)})


class QuantizationRecord(Struct, frozen=True, kw_only=True):
    """How an INT8 engine was made, and how often it gives the class of float32."""

    calibration: Text  # name of the folder with the images
    calibration_images: Annotated[int, Meta(ge=1)]
    check_images: Annotated[int, Meta(ge=1)]  # none of the calibration images
    confident_images: Annotated[int, Meta(ge=0)]  # where float32 has a probability above 0.5
    agreement: Annotated[float, Meta(ge=0, le=1)]  # on these; on all if there are none
    float_layers: tuple[Text, ...] = ()  # layers that are not quantised


class EngineRecord(Struct, frozen=True, kw_only=True):
    """One compiled engine: its backend, the hardware it needs, its files and its accuracy."""

    name: FileName  # for example "openvino-bf16"
    backend: Word
    backend_version: Text
    precision: Word
    hardware: Text  # the features it needs, in the backend's own words
    max_batch: Count
    opt_batch: Annotated[int, Meta(ge=0)] = 0  # rows it is tuned for; 0: none in particular
    min_batch: Count = 1  # smaller batches are padded to this size
    files: Annotated[tuple[FileRecord, ...], Meta(min_length=1)]
    # Largest deviation from eager PyTorch by batch size; see golden_check.py. Empty if the machine
    # that compiled the engine could not run it. Every server checks an engine when it loads it.
    deviation: dict[str, Annotated[float, Meta(ge=0)]]
    quantization: QuantizationRecord | None = None  # of precision int8


class Manifest(Struct, frozen=True, kw_only=True):
    """Everything that is known about a version before it is loaded."""

    format: int
    model: Annotated[str, Meta(pattern=f"^{MODEL_NAME.pattern}\\Z")]
    version: Annotated[int, Meta(ge=1, lt=10**18)]
    created: Text  # UTC, ISO 8601
    architecture: Word
    parameters: Annotated[int, Meta(ge=1)]  # trainable ones of the served network
    weights: WeightsRecord
    card_sha256: Sha256
    input: InputRecord
    classes: Count
    top_k: Count
    activation: Activation = "softmax"
    objective_ms: Annotated[float, Meta(gt=0)]  # latency objective for requests without a deadline
    share: Annotated[float, Meta(ge=SHARE_RANGE[0], le=SHARE_RANGE[1])] = 1.0  # of a shared device
    onnx: FileRecord
    golden: FileRecord
    labels: FileRecord
    engines: Annotated[tuple[EngineRecord, ...], Meta(min_length=1)]

    def files(self) -> Iterator[FileRecord]:
        yield from (self.onnx, self.golden, self.labels)
        for engine in self.engines:
            yield from engine.files


def decode_manifest(text: bytes) -> Manifest:
    """Parses and checks manifest.json. Raises InvalidVersion."""
    try:
        declared = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidVersion(f"{MANIFEST_FILE} is not JSON: {error}") from None
    number = declared.get("format") if isinstance(declared, dict) else None
    if number != MANIFEST_FORMAT:
        given = f"{number!r:.40}"
        raise InvalidVersion(
            f"{MANIFEST_FILE} has format {given}; this server reads format {MANIFEST_FORMAT}"
        )
    try:
        manifest = msgspec.convert(declared, Manifest)
        manifest.input.spec()
    except ValueError as error:  # msgspec.ValidationError is a ValueError
        raise InvalidVersion(f"{MANIFEST_FILE} is malformed: {error}") from None
    _check_names(manifest)
    _check_sizes(manifest)
    return manifest


def _check_names(manifest: Manifest) -> None:
    files = Counter([MANIFEST_FILE, *(file.name for file in manifest.files())])
    engines = Counter(engine.name for engine in manifest.engines)
    for name, times in (files + engines).items():
        if files[name] > 1 or engines[name] > 1:
            raise InvalidVersion(
                f"{MANIFEST_FILE} has the name {name} {times} times; names must be unique"
            )


def _check_sizes(manifest: Manifest) -> None:
    if manifest.top_k > manifest.classes:
        raise InvalidVersion(
            f"{MANIFEST_FILE}: top_k is {manifest.top_k}; "
            f"at most the {manifest.classes} classes are allowed"
        )
    row_bytes = manifest.input.height * manifest.input.width * manifest.input.channels
    for engine in manifest.engines:
        if engine.max_batch * row_bytes > MAX_BATCH_BYTES:
            raise InvalidVersion(
                f"{MANIFEST_FILE}: a batch of {engine.max_batch} rows would take "
                f"{engine.max_batch * row_bytes} bytes; at most {MAX_BATCH_BYTES} are allowed"
            )
