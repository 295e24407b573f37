"""Puts the graph of a network that PyTorch can't trace into an exported graph.

The graph around the network is exported with one node in its place, and the node is replaced. That
is for ONNX files, and for TorchScript programs: torch.export cannot trace a program with a variable
batch, so the program is exported by torch's older exporter.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, compose, helper
from torch import Tensor, nn

DOMAIN, OPERATOR = "convserve", "Program"
PREFIX = "program/"
RESHAPE_WITH_ALLOWZERO = 14  # the first version of the operators with this attribute


class Placeholder(nn.Module):
    """Stands for a program while the graph around it is traced. It computes nothing.

    `shape` is that of an image: H, W, C.
    """

    def __init__(self, program: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        height, width, channels = shape
        with torch.no_grad():
            self.classes = int(program(torch.zeros(2, channels, height, width)).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, classes]."""
        shape = (x.shape[0], self.classes)
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", (x,), dtype=torch.float32, shape=shape, version=1
        )
        return out


def insert_program(path: Path, program: nn.Module, shape: tuple[int, int, int]) -> None:
    """Replaces the node of a Placeholder in the ONNX file by the program for [N, H, W, C] images.

    Raises the exporter's errors.
    """
    model = onnx.load_model(path)
    inner = _exported(program, path.with_name(f".{path.name}.program"), shape, opset_of(model))
    insert_graph(path, inner)


def insert_graph(path: Path, inner: ModelProto) -> None:
    """Replaces the node of a Placeholder in the ONNX file by a graph with one input and one output.

    Both graphs get the operator version of the inner one.
    """
    model = onnx.load_model(path)
    place = next(node for node in model.graph.node if node.op_type == OPERATOR)
    inner = compose.add_prefix(inner, PREFIX)
    _connect(inner.graph, place)
    nodes = list(model.graph.node)
    position = nodes.index(place)
    nodes[position : position + 1] = inner.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(inner.graph.initializer)
    model.graph.sparse_initializer.extend(inner.graph.sparse_initializer)
    model.functions.extend(inner.functions)
    versions = {each.domain: each.version for each in model.opset_import} | {
        each.domain: each.version for each in inner.opset_import
    }
    versions.pop(DOMAIN, None)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*each) for each in versions.items())
    model.ir_version = max(model.ir_version, inner.ir_version)
    if versions[""] < RESHAPE_WITH_ALLOWZERO:
        for node in model.graph.node:
            kept = [each for each in node.attribute if each.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.save_model(model, path)


def opset_of(model: ModelProto) -> int:
    """The version of the standard operators."""
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


def _exported(
    program: nn.Module, path: Path, shape: tuple[int, int, int], opset: int
) -> onnx.ModelProto:
    height, width, channels = shape
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the older exporter
            torch.onnx.export(
                program,
                (torch.zeros(2, channels, height, width),),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "rows"}, "logits": {0: "rows"}},
            )
        return onnx.load_model(path)
    finally:
        path.unlink(missing_ok=True)


def _connect(inner: GraphProto, place: NodeProto) -> None:
    """Gives the ends of the inner graph the names that they have outside."""
    names = {inner.input[0].name: place.input[0], inner.output[0].name: place.output[0]}
    for node in inner.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = names.get(name, name)
