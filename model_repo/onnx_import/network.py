"""An ONNX classifier as a network: normalised images in, logits out.

It computes with ONNX Runtime on the file as it is. So it is the truth that the engines, which are
compiled from a changed graph, are compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from model_repo.onnx_import.batches import with_variable_batch
from model_repo.onnx_import.ending import Ending, last_activation
from model_repo.onnx_import.errors import UnusableGraph
from model_repo.onnx_import.inner_graph import inner_graph
from model_repo.onnx_import.interface import ImageInput, choose_output, image_input

MAX_BYTES = (1 << 31) - 1  # of a served graph: protobuf's limit
SUM_TOLERANCE = 1e-3  # of the probabilities of an image
FLOOR = 1e-12  # of a probability before its logarithm
SIGMOID_FLOOR = 1e-9  # distance of a probability from 0 and 1 before its logit
# Largest difference of a score that is computed twice, relative to the largest score.
MAX_DIFFERENCE = 1e-3

Scores = NDArray[np.float32]


class OnnxNetwork(nn.Module):
    """Takes normalised [N, C, H, W] and returns logits [N, classes], like a network of ours."""

    def __init__(self, path: Path, shape: tuple[int, int, int], classes: int, output: str) -> None:
        """`shape` is that of an image (H, W, C). Raises UnusableGraph."""
        super().__init__()
        self.classes = classes
        self._model = _read(path)
        self.image: ImageInput = image_input(self._model, shape)
        self._session = _session(path, path.name)
        self._shape = shape
        rows = self.image.batch or 2
        trial = _images(rows, shape)
        outputs = [each.name for each in self._session.get_outputs()]
        found = self._run(self._session, outputs, trial)
        self.output, self.width = choose_output(
            [(name, each.shape) for name, each in zip(outputs, found, strict=True)],
            classes,
            rows,
            output,
        )
        self.sha256 = _sha256(path, self._model)
        _, self.ending = last_activation(self._model, self.output)
        self.gives_probabilities = bool(self.ending) or self._looks_like_probabilities()
        self.max_batch: int | None = None  # None: any
        self._batched = self._model if self.image.batch is None else self._rebatched()

    @property
    def parameter_count(self) -> int:
        """The numbers in all weights."""
        tensors = self._model.graph.initializer
        return max(1, sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.dims))

    def described(self) -> str:
        """What was found, in one line."""
        order = "[N, H, W, C]" if self.image.is_channels_last else "[N, C, H, W]"
        kind = self.ending or ("probabilities" if self.gives_probabilities else "logits")
        batch = ""
        if self.max_batch is not None:
            batch = f"; it works only with a batch of {self.max_batch}, so images are not batched"
        elif self.image.batch is not None:
            batch = f"; its batch of {self.image.batch} was made variable"
        return f"takes {self.image.dtype} {order}, ends with {kind}{batch}"

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.from_numpy(self._scores(self._session, x.numpy()))
        if self.ending == "sigmoid":
            scores = torch.logit(scores.double(), eps=SIGMOID_FLOOR).float()
        elif self.gives_probabilities:
            scores = scores.clamp(min=FLOOR).log()
        if self.width == 1 and self.classes == 2:
            return torch.cat([torch.zeros_like(scores), scores], dim=1)
        return scores

    def check_activation(self, activation: str) -> None:
        """Whether the card's activation is the one in the graph. Raises UnusableGraph."""
        ending: Ending = self.ending
        one_score = self.width == 1 and self.classes == 2
        if ending == "sigmoid" and activation == "softmax" and not one_score:
            raise UnusableGraph(
                "ends with a sigmoid: each class has a probability of its own; write "
                'activation = "sigmoid" in the card'
            )
        if ending == "softmax" and activation == "sigmoid":
            raise UnusableGraph(
                "ends with a softmax, so the probabilities add up to 1; write "
                'activation = "softmax" in the card'
            )
        if one_score and activation == "sigmoid":
            raise UnusableGraph(
                "has one score for two classes, that of the second; write "
                'activation = "softmax" in the card'
            )

    def graph(self, opset: int) -> ModelProto:
        """The graph to serve: "images" float32 [rows, C, H, W] to "logits" [rows, classes]."""
        return inner_graph(
            self._batched,
            self.image,
            self.output,
            classes=self.classes,
            width=self.width,
            gives_probabilities=self.gives_probabilities,
            batch=self.max_batch,
            opset=opset,
        )

    def _scores(self, session: onnxruntime.InferenceSession, x: NDArray[np.float32]) -> Scores:
        """[N, C, H, W] -> [N, width], in batches of the size that the file has."""
        size = self.image.batch if session is self._session else None
        size = size or len(x)
        parts = []
        for first in range(0, len(x), size):
            part = x[first : first + size]
            padding = np.repeat(part[:1], size - len(part), axis=0)
            (found,) = self._run(session, [self.output], np.concatenate([part, padding]))
            parts.append(found[: len(part)].reshape(len(part), self.width))
        return np.concatenate(parts).astype(np.float32)

    def _run(
        self, session: onnxruntime.InferenceSession, outputs: Sequence[str], x: NDArray[np.float32]
    ) -> list[NDArray[Any]]:
        if self.image.is_channels_last:
            x = x.transpose(0, 2, 3, 1)
        if self.image.dtype == "uint8":
            x = x.round().clip(0, 255)
        given = np.ascontiguousarray(x.astype(self.image.dtype))
        try:
            found: list[NDArray[Any]] = session.run(outputs, {self.image.name: given})
        except Exception as error:  # ONNX Runtime has no public classes of errors
            raise UnusableGraph(
                f"fails in ONNX Runtime with images {list(given.shape)}: {_reason(error)}"
            ) from error
        return found

    def _looks_like_probabilities(self) -> bool:
        """Whether the scores of different images all add up to 1."""
        scores = self._scores(self._session, _images(4, self._shape))
        sums = scores.sum(axis=1, dtype=np.float64)
        is_sum = bool(scores.min() >= 0 and np.abs(sums - 1).max() <= SUM_TOLERANCE)
        return is_sum and self.width > 1

    def _rebatched(self) -> ModelProto:
        """The graph with a variable batch; as it is if it does not compute the same."""
        assert self.image.batch is not None
        changed = with_variable_batch(self._model, self.image.batch)
        images = _images(3, self._shape)
        expected = self._scores(self._session, images)
        try:
            session = _session(changed.SerializeToString(), "the graph with a variable batch")
            found = self._scores(session, images)
        except (UnusableGraph, ValueError):
            found = None
        limit = MAX_DIFFERENCE * max(1e-6, float(np.abs(expected).max()))
        if found is not None and np.abs(found - expected).max() <= limit:
            return changed
        if self.image.batch != 1:
            raise UnusableGraph(
                f"works only with batches of {self.image.batch}; export it with a batch of 1 or "
                "with a variable one"
            )
        self.max_batch = 1
        return self._model


def _read(path: Path) -> ModelProto:
    """The graph with all its weights. Raises UnusableGraph."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnusableGraph(f"has {size:,} bytes; at most {MAX_BYTES:,} can be served")
        model = onnx.load(path)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        beside = "" if missing == path else f" needs {missing.name} beside it, which"
        raise UnusableGraph(f"{beside.lstrip() + ' ' if beside else ''}does not exist") from None
    except UnusableGraph:
        raise
    except Exception as error:  # of protobuf, or of onnx for the files beside it
        raise UnusableGraph(f"is not a complete ONNX file: {_reason(error)}") from error
    if not model.graph.node:
        raise UnusableGraph("is not a complete ONNX file: it has no nodes")
    return model


def _session(model: Path | bytes, name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the rest is advice
    given = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no public classes of errors
        raise UnusableGraph(f"can't be loaded by ONNX Runtime: {_reason(error)}") from error


def _sha256(path: Path, model: ModelProto) -> str:
    """Of the file, and of the files beside it that hold its weights."""
    digest = hashlib.sha256(path.read_bytes())
    for name in sorted(_external_files(path)):
        digest.update(name.encode() + hashlib.sha256((path.parent / name).read_bytes()).digest())
    return digest.hexdigest()


def _external_files(path: Path) -> set[str]:
    model = onnx.load(path, load_external_data=False)
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _images(count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """[count, C, H, W] of noise, in a range that suits both normalised images and bytes."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    made: NDArray[np.float32] = rng.random((count, channels, height, width), np.float32) * 2
    return made


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]
