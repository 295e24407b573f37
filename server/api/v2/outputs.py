"""Outputs that a request of the Open Inference Protocol asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.api.inference import InferenceResponse, OutputSelection, best_classes
from server.api.v2.shared_memory import CallWindows, RegionWindow
from server.api.v2.tensors import (
    ELEMENT_BYTES,
    OUTPUTS,
    PROBABILITIES,
    REGION,
    REGION_BYTES,
    SCORES,
    OutputRequest,
    OutputTensor,
    dimensions,
    refuse_parameters,
    whole_number,
)
from server.api.v2.versions import MAX_QUOTED
from server.engines.base import Outputs
from server.errors import InvalidInput
from server.models.version import LoadedModel

CLASSIFICATION = "classification"  # parameter of an output: texts of the best classes (Triton's)
CLASSIFIABLE = (SCORES, PROBABILITIES)


class _Selected(NamedTuple):
    """An output to return."""

    name: str
    best: int = 0  # number of classes to return as texts; 0 returns the numbers
    window: RegionWindow | None = None  # where to write it, instead of into the response


class TensorOutputs(OutputSelection):
    """The outputs of one request, in the order of the request; all of them if it names none."""

    __slots__ = ("_requests", "_selected", "_windows")

    def __init__(self, requests: Sequence[OutputRequest], windows: CallWindows) -> None:
        self._requests = requests
        self._windows = windows
        self._selected: list[_Selected] = []

    def check(self, model: LoadedModel, images: int) -> None:
        if not self._requests:
            self._selected = [_Selected(name) for name in OUTPUTS]
            return
        for position, request in enumerate(self._requests):
            field = f"outputs[{position}]"
            self._selected.append(self._select(field, request, model))
        for position, output in enumerate(self._selected):
            _check_room(f"outputs[{position}]", output, images, model)

    def tensors(self, response: InferenceResponse) -> list[OutputTensor]:
        """The outputs; those for shared memory are written there. Raises InvalidInput."""
        labels = response.model.labels
        return [_tensor(output, response.outputs, labels) for output in self._selected]

    def _select(self, field: str, request: OutputRequest, model: LoadedModel) -> _Selected:
        name, parameters = request
        if name not in OUTPUTS:
            raise InvalidInput(
                f"{field}.name", f"is {name[:MAX_QUOTED]!r}; {', '.join(OUTPUTS)} are allowed"
            )
        if any(name == other.name for other in self._selected):
            raise InvalidInput(f"{field}.name", f"is {name!r}, which is requested already")
        refuse_parameters(f"{field}.parameters", parameters)
        best = 0
        if CLASSIFICATION in parameters:
            parameter = f"{field}.parameters[{CLASSIFICATION}]"
            if name not in CLASSIFIABLE:
                allowed = " or ".join(CLASSIFIABLE)
                raise InvalidInput(parameter, f"is given for {name!r}; {allowed} can have it")
            most = model.manifest.top_k if name == SCORES else model.manifest.classes
            best = whole_number(parameter, parameters[CLASSIFICATION], 1, most)
        window = self._windows.open(f"{field}.parameters", parameters)
        if window is not None and best:
            raise InvalidInput(
                f"{field}.parameters[{REGION}]",
                f"is given, and {CLASSIFICATION} too, whose texts only fit into the response",
            )
        return _Selected(name, best, window)


def _check_room(field: str, output: _Selected, images: int, model: LoadedModel) -> None:
    """Raises InvalidInput for a window that is too small."""
    if output.window is None:
        return
    given = output.window.part.byte_size
    needed = images * math.prod(dimensions(model)[output.name]) * ELEMENT_BYTES
    if needed > given:
        raise InvalidInput(
            f"{field}.parameters[{REGION_BYTES}]",
            f"is {given:,}; {output.name!r} of {images} images needs {needed:,}",
        )


def _tensor(output: _Selected, outputs: Outputs, labels: Sequence[str]) -> OutputTensor:
    if output.best:
        texts = _texts(outputs, output.best, labels)
        return OutputTensor(output.name, "BYTES", (len(outputs.classes), output.best), texts)
    values: NDArray[Any] = np.ascontiguousarray(getattr(outputs, output.name))
    tensor = OutputTensor(output.name, OUTPUTS[output.name], values.shape, values)
    if output.window is not None:
        tensor.region = output.window.write(values.data.cast("B"))
        tensor.elements = ()
    return tensor


def _texts(outputs: Outputs, best: int, labels: Sequence[str]) -> list[str]:
    """The best classes of each row as "score:index:label"."""
    if best > outputs.classes.shape[1]:  # the engine has sorted fewer
        order = np.argsort(-outputs.probabilities, axis=1, kind="stable")
        classes = order.astype(np.int32)
        scores = np.take_along_axis(outputs.probabilities, classes, axis=1)
        outputs = outputs._replace(classes=classes, scores=scores)
    return [
        f"{score:f}:{index}:{labels[index]}"
        for row in best_classes(outputs, best)
        for index, score in row
    ]
