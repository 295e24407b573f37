"""A float32 ONNX graph -> the same network in half precision, its types written into the graph.

TensorRT takes every type from the graph ("strongly typed" networks, the only ones since 11), so the
precision of an engine is decided here. What normalises the pixels, the last layer, softmax and
top-k stay float32; so do local response normalisations, whose sums of squares leave float16's
range. One stored graph thus serves every precision, where the network itself is gone.

Needs the library `onnx`, which only compiling does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import EngineFailure

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "Gemm", "MatMul")
KEPT = ("LRN",)  # stay float32 amid the rest


def convert_precision(path: Path, precision: str) -> bytes:
    """The graph at `path`, serialised, its body computing in "fp16", "bf16" or "fp32".

    The graph is one of model_repo.export's: cast, normalisation, transpose, the network, softmax,
    top-k. Raises EngineFailure where it is none.
    """
    import onnx

    try:
        model = onnx.load(path)
        if not model.graph.node:
            raise ValueError("it holds no nodes")
        if precision != "fp32":
            _reduce(model, precision)
        return bytes(model.SerializeToString())
    except Exception as error:  # protobuf's own, and what a strange graph makes of the lines below
        raise EngineFailure(f"{path.name} is no graph to compile: {error!r}") from error


def _reduce(model: onnx.ModelProto, precision: str) -> None:
    import ml_dtypes
    import numpy as np
    from onnx import TensorProto, numpy_helper

    number, kind = {
        "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
        "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    }[precision]
    graph = model.graph
    nodes = list(graph.node)
    entry, last = _entry(graph), _last_layer(graph)
    casts = _Casts(TensorProto.FLOAT, number)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    written: list[Any] = []
    body = _body(nodes, entry, last)
    for node in nodes:
        if node is last:
            written.append(casts.wide(node, 0))
        elif id(node) in body and node.op_type in KEPT:
            written += [casts.wide(node, 0), node, casts.narrow_output(node)]
            continue
        elif id(node) in body:
            for place, name in enumerate(node.input):
                if name == entry:
                    node.input[place] = casts.entry
                tensor = weights.get(name)
                if tensor is not None and tensor.data_type == TensorProto.FLOAT:
                    values = numpy_helper.to_array(tensor).astype(kind)
                    tensor.CopyFrom(numpy_helper.from_array(values, name))
        written.append(node)
        if entry in node.output:
            written.append(casts.narrow(entry, casts.entry))
    del graph.node[:]
    graph.node.extend(written)
    del graph.value_info[:]  # of the types before; whoever reads the graph infers them


class _Casts:
    """Makes the nodes that change types."""

    entry = "pixels_reduced"

    def __init__(self, wide: int, narrow: int) -> None:
        self._wide = wide
        self._narrow = narrow

    def wide(self, node: Any, place: int) -> Any:
        """Widens an input of the node."""
        name = node.input[place]
        node.input[place] = f"{name}_wide_for_{node.name}"
        return _cast(name, node.input[place], self._wide)

    def narrow_output(self, node: Any) -> Any:
        """Narrows what the node gives."""
        name = node.output[0]
        node.output[0] = f"{name}_wide"
        return self.narrow(node.output[0], name)

    def narrow(self, name: str, output: str) -> Any:
        return _cast(name, output, self._narrow)


def _cast(name: str, output: str, to: int) -> Any:
    from onnx import helper

    return helper.make_node("Cast", [name], [output], name=f"cast_{output}", to=to)


def _entry(graph: Any) -> str:
    """The tensor that enters the network: what the first transpose gives."""
    return str(next(node for node in graph.node if node.op_type == "Transpose").output[0])


def _last_layer(graph: Any) -> Any:
    """The layer whose numbers softmax gets."""
    makers = {output: node for node in graph.node for output in node.output}
    node = next(node for node in graph.node if node.op_type == "Softmax")
    while node.op_type not in LAYERS:
        node = makers[node.input[0]]
    return node


def _body(nodes: list[Any], entry: str, last: Any) -> set[int]:
    """Identities of the nodes that lie between the entry and the last layer."""
    reached, found = {entry}, set()
    for node in nodes:
        if node is last:
            break
        if reached & set(node.input):
            reached.update(node.output)
            found.add(id(node))
    return found
