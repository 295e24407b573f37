"""Gives a graph that was exported for a fixed batch a variable one.

Most exporters write a batch of 1. Usually the number stands only in the shapes of the ends and as
the first number of constant shapes inside. Whether the changed graph still computes the same is
tried with images, because a graph may also use the number in other ways.
"""

from __future__ import annotations

import copy

import numpy as np
from onnx import ModelProto, numpy_helper

ROWS = "rows"
# Operators with a shape as an input: its position.
SHAPE_INPUTS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def with_variable_batch(model: ModelProto, batch: int) -> ModelProto:
    """A copy in which the fixed batch is replaced by a variable one."""
    changed = copy.deepcopy(model)
    graph = changed.graph
    constants = {tensor.name for tensor in graph.initializer}
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and dims and dims[0].dim_value == batch:
            dims[0].dim_param = ROWS
    del graph.value_info[:]  # shapes inside are inferred again
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    made = {
        output: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for output in node.output
        for attribute in node.attribute
        if attribute.name == "value"
    }
    for number, node in enumerate(graph.node):
        position = SHAPE_INPUTS.get(node.op_type)
        if position is None or position >= len(node.input):
            continue
        tensor = initializers.get(node.input[position], made.get(node.input[position]))
        if tensor is None:
            continue
        shape = _without_batch(numpy_helper.to_array(tensor), batch, node.op_type)
        if shape is None:
            continue
        # The constant may have other users, so the node gets one of its own.
        name = f"{node.input[position]}_rows_{number}"
        graph.initializer.append(numpy_helper.from_array(shape, name))
        node.input[position] = name
    return changed


def _without_batch(shape: np.ndarray, batch: int, operator: str) -> np.ndarray | None:
    """The shape with a variable first dimension; None if it does not start with the batch."""
    if shape.ndim != 1 or len(shape) < 2 or shape[0] != batch:
        return None
    changed = shape.astype(np.int64)
    if operator == "Reshape":
        changed[0] = 0 if -1 in shape else -1  # 0: as in the input
    elif operator == "Expand":
        changed[0] = 1  # broadcasts: the input has the rows
    else:
        return None  # nothing in a constant shape can follow the rows
    return changed
