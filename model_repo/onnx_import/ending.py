"""How a graph ends: with logits or with probabilities. The served graph needs logits."""

from __future__ import annotations

from typing import Literal

from onnx import ModelProto, NodeProto

Ending = Literal["softmax", "sigmoid", ""]

# Operators that only pass the scores on.
PASSING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout")
ACTIVATIONS: dict[str, Ending] = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


def last_activation(model: ModelProto, output: str) -> tuple[NodeProto | None, Ending]:
    """The softmax or sigmoid that the output comes from; none if it comes from another node."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(output)
    while node is not None and node.op_type in PASSING and node.domain in ("", "ai.onnx"):
        node = producers.get(node.input[0])
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in ACTIVATIONS:
        return None, ""
    return node, ACTIVATIONS[node.op_type]


def remove(node: NodeProto) -> None:
    """Makes a node pass its input on."""
    node.op_type = "Identity"
    del node.attribute[:]
