"""Exported networks: pixels in, classes out, a variable batch, no superfluous operators."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from model_repo.export import ExportError, OnnxLocalResponseNorm, ServedNetwork, export, trace
from server.engines.onnx_precision import convert_precision

SHAPE = (12, 10, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 13
MAX_BATCH = 5


def network() -> nn.Module:
    """A small network with every kind of layer that the served networks use."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5, alpha=2.0, beta=0.75, k=2.0),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


class Exported:
    """A network and its ONNX file."""

    def __init__(self, folder: Path) -> None:
        self.served = ServedNetwork(network(), top_k=10, mean=MEAN, std=STD)
        self.path = folder / "model.onnx"
        export(self.served, self.path, shape=SHAPE, max_batch=MAX_BATCH)
        self.graph = onnx.load_model(self.path).graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("export"))


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_fixed_shapes_except_for_the_batch(exported: Exported) -> None:
    kind = onnx.TensorProto
    signature = {
        value.name: (value.type.tensor_type.elem_type, dimensions(value))
        for value in [*exported.graph.input, *exported.graph.output]
    }
    assert signature == {
        "pixels": (kind.UINT8, ["rows", *SHAPE]),
        "classes": (kind.INT32, ["rows", 10]),
        "scores": (kind.FLOAT, ["rows", 10]),
        "probabilities": (kind.FLOAT, ["rows", CLASSES]),
    }


def test_the_graph_has_no_superfluous_operators(exported: Exported) -> None:
    assert Counter(node.op_type for node in exported.graph.node) == {
        "Cast": 2,  # pixels to float32, classes to int32
        "Mul": 1,
        "Add": 1,
        "Transpose": 1,
        "Conv": 1,  # includes the batch norm
        "Relu": 1,
        "LRN": 1,
        "MaxPool": 1,
        "ReduceMean": 1,
        "Reshape": 3,  # to lines of pixels and back, and after the pool
        "Gemm": 1,
        "Softmax": 1,
        "TopK": 1,
    }
    first = exported.graph.node[0]
    assert (first.op_type, list(first.input)) == ("Cast", ["pixels"]), "TensorRT needs it first"


def test_the_file_contains_no_paths_of_the_machine_that_made_it(exported: Exported) -> None:
    content = exported.path.read_bytes()
    assert str(Path(__file__).resolve().parent.parent.parent).encode() not in content
    assert b"site-packages" not in content
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]


def test_the_graph_agrees_with_eager_pytorch_at_every_batch_size(exported: Exported) -> None:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(exported.path, "CPU", settings)
    rng = np.random.default_rng(0)
    for rows in range(1, MAX_BATCH + 1):
        pixels = rng.integers(0, 256, (rows, *SHAPE), np.uint8)
        outputs = compiled(pixels)
        with torch.inference_mode():
            classes, scores, probabilities = exported.served(torch.from_numpy(pixels))
        assert np.array_equal(outputs["classes"], classes.numpy())
        np.testing.assert_allclose(outputs["scores"], scores.numpy(), atol=1e-5)
        np.testing.assert_allclose(outputs["probabilities"], probabilities.numpy(), atol=1e-5)


def test_scores_are_the_largest_probabilities_in_descending_order(exported: Exported) -> None:
    pixels = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    with torch.inference_mode():
        classes, scores, probabilities = exported.served(pixels)
    assert (classes.dtype, scores.dtype) == (torch.int32, torch.float32)
    assert torch.equal(probabilities.sort(descending=True).values[:, :10], scores)
    assert torch.equal(probabilities.gather(1, classes.long()), scores)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_as_many_classes_are_returned_as_the_card_says() -> None:
    served = ServedNetwork(nn.Flatten(), top_k=4, mean=(0.5,), std=(0.5,))
    classes, scores, probabilities = served(torch.zeros(2, 2, 3, 1, dtype=torch.uint8))
    assert classes.shape == scores.shape == (2, 4)
    assert probabilities.shape == (2, 6)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_takes_rgb_for_a_bgr_network_and_gives_independent_probabilities(
    precision: str, tmp_path: Path
) -> None:
    body = network()
    served = ServedNetwork(body, top_k=3, mean=MEAN, std=STD, activation="sigmoid", reverse=True)
    path = tmp_path / "model.onnx"
    export(served, path, shape=SHAPE, max_batch=MAX_BATCH)
    path.write_bytes(convert_precision(path, precision))
    pixels = np.random.default_rng(1).integers(0, 256, (3, *SHAPE), np.uint8)
    blue_first = torch.from_numpy(pixels[..., ::-1].copy()).float() / 255
    normalised = (blue_first - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.inference_mode():
        expected = body.eval()(normalised.permute(0, 3, 1, 2)).sigmoid()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    outputs = ov.Core().compile_model(path, "CPU", settings)(pixels)
    limit = 1e-5 if precision == "fp32" else 0.02
    np.testing.assert_allclose(outputs["probabilities"], expected.numpy(), atol=limit)
    assert outputs["classes"].shape == (3, 3)
    best = torch.from_numpy(outputs["probabilities"]).topk(3).values
    np.testing.assert_allclose(outputs["scores"], best.numpy(), atol=1e-6)
    assert (outputs["probabilities"].sum(axis=1) > 2).all(), "each class by itself"


def test_the_folded_normalisation_equals_the_definition() -> None:
    class Logits(nn.Module):
        seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return x.flatten(1)

    network = Logits()
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    ServedNetwork(network, top_k=10, mean=MEAN, std=STD)(pixels)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std
    torch.testing.assert_close(network.seen.double(), expected, atol=1e-6, rtol=0)


def test_exporting_prints_nothing_and_leaves_the_network_unchanged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = nn.Sequential(nn.LocalResponseNorm(3), nn.Flatten())
    served = ServedNetwork(body, top_k=10, mean=(0.5,), std=(0.5,))
    level = logging.getLogger("torch.onnx").level
    export(served, tmp_path / "one.onnx", shape=(4, 3, 1), max_batch=1)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    assert type(body[0]) is nn.LocalResponseNorm
    probabilities = served(torch.ones(1, 4, 3, 1, dtype=torch.uint8))[2]
    assert probabilities.std() < 1e-6, "the placeholder for tracing would compute garbage"


def test_a_network_that_cannot_be_traced_is_an_error_and_stays_unchanged(tmp_path: Path) -> None:
    class DataDependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LocalResponseNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x).flatten(1)
            return x if x.sum() > 0 else -x

    served = ServedNetwork(DataDependent(), top_k=10, mean=(0.5,), std=(0.5,))
    with pytest.raises(ExportError, match="data-dependent"):
        export(served, tmp_path / "data_dependent.onnx", shape=(4, 3, 1), max_batch=2)
    assert not any(isinstance(module, OnnxLocalResponseNorm) for module in served.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_last_layer_stays_float32_in_half_precision(precision: str, dtype: torch.dtype) -> None:
    served = ServedNetwork(network(), top_k=10, mean=MEAN, std=STD)
    program = trace(served, SHAPE, MAX_BATCH, precision, "cpu", opt_batch=4)
    state = program.state_dict
    (last,) = (value for value in state.values() if value.shape == (CLASSES, 8))
    assert torch.equal(last, served.network.get_parameter("8.weight")), "not rounded"
    (convolution,) = (value for value in state.values() if value.dim() == 4)
    assert convolution.dtype == dtype
    assert served.network.get_parameter("0.weight").dtype == torch.float32
    (rows,) = program.range_constraints.values()
    assert (rows.lower, rows.upper) == (1, MAX_BATCH)
