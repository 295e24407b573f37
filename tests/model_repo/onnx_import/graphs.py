"""Small ONNX classifiers, written as the usual exporters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HEIGHT, WIDTH, CHANNELS, CLASSES = 12, 10, 3, 4
SHAPE = HEIGHT, WIDTH, CHANNELS


def classifier(
    *,
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    dtype: int = TensorProto.FLOAT,
    batch: int | str = "N",
    classes: int = CLASSES,
    ending: Literal["", "Softmax", "Sigmoid", "sums"] = "",
    pooling: Literal["", "Reshape", "over the batch"] = "",
    opset: int = 17,
) -> ModelProto:
    """Convolution, ReLU, average over the image, dense layer, and how the graph ends.

    `pooling` decides how the batch stands in the graph: not at all, as a constant of a Reshape, or
    in a way that can't be replaced.
    """
    rng = np.random.default_rng(7)
    weights = {
        "w": rng.normal(size=(8, CHANNELS, 3, 3)).astype(np.float32),
        "dense": rng.normal(size=(8, classes)).astype(np.float32) * 4,
        "bias": rng.normal(size=classes).astype(np.float32),
    }
    nodes: list[NodeProto] = []

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    last = "image"
    if dtype != TensorProto.FLOAT:
        last = add("Cast", [last], "floats", to=TensorProto.FLOAT)
    if layout == "NHWC":
        last = add("Transpose", [last], "planes", perm=[0, 3, 1, 2])
    last = add("Conv", [last, "w"], "conv", pads=[1, 1, 1, 1])
    last = add("Relu", [last], "relu")
    last = add("GlobalAveragePool", [last], "pool")
    if pooling == "Reshape":
        weights["flat"] = np.array([batch, 8], np.int64)
        last = add("Reshape", [last, "flat"], "features")
    elif pooling == "over the batch":  # changes nothing for a batch of 1
        last = add("ReduceMax", [last], "largest", axes=[0], keepdims=1)
        last = add("Flatten", [last], "features")
    else:
        last = add("Flatten", [last], "features")
    last = add("MatMul", [last, "dense"], "products")
    last = add("Add", [last, "bias"], "logits")
    if ending == "sums":  # probabilities without a softmax
        last = add("Exp", [last], "exp")
        sums = add("ReduceL1", [last], "total", axes=[1])
        last = add("Div", [last, sums], "scores")
    elif ending:
        last = add(ending, [last], "scores")
    shape = [HEIGHT, WIDTH, CHANNELS] if layout == "NHWC" else [CHANNELS, HEIGHT, WIDTH]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", dtype, [batch, *shape])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def save(model: ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    onnx.save_model(model, path)
    return path
