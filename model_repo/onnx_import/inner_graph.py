"""The part of a served graph that comes from an ONNX file: normalised images to logits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from model_repo.onnx_import.batches import ROWS
from model_repo.onnx_import.ending import last_activation, remove
from model_repo.onnx_import.errors import UnusableGraph
from model_repo.onnx_import.interface import ImageInput

IMAGES, LOGITS = "images", "logits"
PREFIX = "file/"
LEAST_OPSET = 13
NUMBERS = {"float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def inner_graph(
    model: ModelProto,
    image: ImageInput,
    output: str,
    *,
    classes: int,
    width: int,
    gives_probabilities: bool,
    batch: int | None,
    opset: int,
) -> ModelProto:
    """A graph of "images" float32 [rows, C, H, W] and "logits" float32 [rows, classes].

    A softmax or sigmoid at the end is left out. Probabilities from other nodes become logits by
    their logarithm. The graph has `opset`, or a newer one of the file. Raises UnusableGraph.
    """
    changed = _with_opset(copy.deepcopy(model), opset)
    activation, ending = last_activation(changed, output)
    if activation is not None:
        remove(activation)
    changed = onnx.compose.add_prefix(changed, PREFIX)
    graph = changed.graph
    before, after = (
        _before(image),
        _after(output, classes, width, gives_probabilities and not ending),
    )
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([-1, width], np.int64), "row"))
    graph.initializer.append(numpy_helper.from_array(np.array(1e-12, np.float32), "floor"))
    rows = batch or ROWS
    constants = {tensor.name for tensor in graph.initializer}
    kept = [each for each in graph.input if each.name in constants]
    del graph.input[:]
    graph.input.append(
        helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [rows, None, None, None])
    )
    graph.input.extend(kept)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [rows, classes]))
    return changed


def _before(image: ImageInput) -> list[NodeProto]:
    """From "images" to the input of the file."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if image.is_channels_last:
        steps.append(("Transpose", {"perm": [0, 2, 3, 1]}))
    if image.dtype in NUMBERS:
        steps.append(("Cast", {"to": NUMBERS[image.dtype]}))
    return _chain(steps, IMAGES, PREFIX + image.name)


def _after(output: str, classes: int, width: int, is_probability: bool) -> list[NodeProto]:
    """From the output of the file to "logits"."""
    nodes = [
        helper.make_node("Cast", [PREFIX + output], ["scores_cast"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["scores_cast", "row"], ["scores"]),
    ]
    last = "scores"
    if is_probability:
        nodes += [
            helper.make_node("Max", [last, "floor"], ["scores_positive"]),
            helper.make_node("Log", ["scores_positive"], ["scores_log"]),
        ]
        last = "scores_log"
    if width == 1 and classes == 2:  # the score of the second class against 0 for the first
        nodes += [
            helper.make_node("Sub", [last, last], ["scores_zero"]),
            helper.make_node("Concat", ["scores_zero", last], ["scores_both"], axis=1),
        ]
        last = "scores_both"
    return [*nodes, helper.make_node("Identity", [last], [LOGITS])]


def _chain(steps: list[tuple[str, dict[str, Any]]], first: str, last: str) -> list[NodeProto]:
    steps = steps or [("Identity", {})]
    names = [first, *(f"{first}_{number}" for number in range(1, len(steps))), last]
    return [
        helper.make_node(operator, [names[number]], [names[number + 1]], **attributes)
        for number, (operator, attributes) in enumerate(steps)
    ]


def _with_opset(model: ModelProto, opset: int) -> ModelProto:
    """The graph in at least this version of the operators. Raises UnusableGraph."""
    given = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    if given >= opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except Exception as error:  # the converter knows no operators of other domains
        if given >= LEAST_OPSET:
            return model
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnusableGraph(
            f"uses version {given} of the ONNX operators, and can't be converted to {opset}: "
            f"{lines[-1][:200]}; export it with opset {LEAST_OPSET} or newer"
        ) from error
