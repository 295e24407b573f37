"""Graphs converted to half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

from server.engines import golden_check as golden
from server.engines.onnx_precision import convert_precision
from server.repository import reader
from server.repository.manifest import ONNX_FILE
from tests.support.exported_graph import exported_graph


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["lenet5", "resnet18", "googlenet"])
def test_a_half_precision_graph_stays_within_the_deviation_limit(
    name: str, precision: str, built_repository: Path, tmp_path: Path
) -> None:
    """Runs on OpenVINO in float32, so values are rounded only where the graph says so."""
    folder = built_repository / name / "1"
    manifest, _, expected = reader.open_version(folder)
    path = tmp_path / "converted.onnx"
    path.write_bytes(convert_precision(folder / ONNX_FILE, precision))
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", hint).create_infer_request()
    request.infer([expected.pixels])
    answers = request.get_tensor("probabilities").data
    assert answers.dtype == np.float32
    found = golden.deviation(
        expected.probabilities, answers, golden.deviation_scale(expected.probabilities)
    )
    assert 0 < found < golden.MAX_DEVIATION[precision]


@pytest.mark.parametrize("name", ["lenet5", "googlenet2014"])
def test_normalisation_last_layer_and_lrn_stay_float32(
    name: str, built_repository: Path, tmp_path: Path
) -> None:
    path = exported_graph(name, tmp_path, built_repository)
    graph = onnx.load_from_string(convert_precision(path, "fp16")).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert [{types[name] for name in node.input[1:]} for node in layers] == [
        *[{half}] * (len(layers) - 1),
        {single},
    ]
    normalising = [node for node in graph.node if node.op_type in ("Mul", "Add")][:2]
    assert {types[node.input[1]] for node in normalising} == {single}
    wide = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type == "LRN":
            assert node.input[0] in wide, "its sums exceed the range of float16"
