"""Converts a float32 ONNX graph to half precision by writing the types into the graph.

TensorRT reads every type from the graph ("strongly typed" networks, the only kind since version
11). So the precision of an engine is chosen here. One stored graph serves every precision, even if
the PyTorch network is no longer available.

These parts stay float32: pixel normalisation, the last layer, softmax or sigmoid, and top-k. So
does local response normalisation, because its sums of squares exceed the range of float16.

Needs the `onnx` library, which is required only for compiling.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import EngineFailure

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "Gemm", "MatMul")
PROBABILITIES = "probabilities"  # the output of softmax or sigmoid
FLOAT32_OPERATORS = ("LRN",)  # these stay float32 inside the half-precision part


def convert_precision(path: Path, precision: str) -> bytes:
    """Serialises the graph at `path` so that it computes in "fp16", "bf16" or "fp32".

    The graph must come from model_repo.export: cast, normalisation, transpose, the network,
    softmax or sigmoid, top-k. Raises EngineFailure for any other graph.
    """
    import onnx

    try:
        model = onnx.load(path)
        if not model.graph.node:
            raise ValueError("it contains no nodes")
        if precision != "fp32":
            _reduce(model, precision)
        return bytes(model.SerializeToString())
    except Exception as error:  # from protobuf, or from the code above if the graph is unusual
        raise EngineFailure(f"{path.name} is not a usable ONNX graph: {error!r}") from error


def _reduce(model: onnx.ModelProto, precision: str) -> None:
    """Converts the part between the normalised pixels and the last layer, in place."""
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto, numpy_helper

    onnx_type, numpy_type = {
        "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
        "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    }[precision]
    graph = model.graph
    nodes = list(graph.node)
    first, last = _network_input(graph), _last_layer(graph)
    casts = _Casts(TensorProto.FLOAT, onnx_type)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    converted: list[Any] = []
    between = _nodes_between(nodes, first, last)
    for node in nodes:
        if node is last:
            converted.append(casts.widen_input(node, 0))
        elif id(node) in between and node.op_type in FLOAT32_OPERATORS:
            converted += [casts.widen_input(node, 0), node, casts.narrow_output(node)]
            continue
        elif id(node) in between:
            for index, name in enumerate(node.input):
                if name == first:
                    node.input[index] = casts.network_input
                tensor = weights.get(name)
                if tensor is not None and tensor.data_type == TensorProto.FLOAT:
                    values = numpy_helper.to_array(tensor).astype(numpy_type)
                    tensor.CopyFrom(numpy_helper.from_array(values, name))
        converted.append(node)
        if first in node.output:
            converted.append(casts.narrow(first, casts.network_input))
    del graph.node[:]
    graph.node.extend(converted)
    del graph.value_info[:]  # it holds the old types; readers of the graph infer the new ones


class _Casts:
    """Makes Cast nodes between float32 ("wide") and the reduced precision ("narrow")."""

    network_input = "pixels_reduced"

    def __init__(self, wide: int, narrow: int) -> None:
        self._wide = wide
        self._narrow = narrow

    def widen_input(self, node: Any, index: int) -> Any:
        name = node.input[index]
        node.input[index] = f"{name}_wide_for_{node.name}"
        return _cast(name, node.input[index], self._wide)

    def narrow_output(self, node: Any) -> Any:
        name = node.output[0]
        node.output[0] = f"{name}_wide"
        return self.narrow(node.output[0], name)

    def narrow(self, name: str, output: str) -> Any:
        return _cast(name, output, self._narrow)


def _cast(name: str, output: str, to: int) -> Any:
    from onnx import helper

    return helper.make_node("Cast", [name], [output], name=f"cast_{output}", to=to)


def _network_input(graph: Any) -> str:
    """The tensor that enters the network: the output of the first transpose."""
    return str(next(node for node in graph.node if node.op_type == "Transpose").output[0])


def _last_layer(graph: Any) -> Any:
    """The layer that computes the input of softmax or sigmoid."""
    producers = {output: node for node in graph.node for output in node.output}
    node = producers[PROBABILITIES]
    while node.op_type not in LAYERS:
        node = producers[node.input[0]]
    return node


def _nodes_between(nodes: list[Any], first: str, last: Any) -> set[int]:
    """The ids of the nodes that depend on the tensor `first` and come before `last`."""
    reached, found = {first}, set()
    for node in nodes:
        if node is last:
            break
        if reached & set(node.input):
            reached.update(node.output)
            found.add(id(node))
    return found
