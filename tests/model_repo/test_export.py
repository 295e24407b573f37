"""Promises of an exported network: pixels in, answers out, the batch is free, nothing is extra."""

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

from model_repo.export import ExportError, OnnxLocalResponseNorm, Served, export, traced

SHAPE = (12, 10, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 13
MAX_BATCH = 5


def network() -> nn.Module:
    """Everything that the papers' networks are made of, small."""
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
    """The network, its file, and what came to the console meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.served = Served(network(), classes=CLASSES, mean=MEAN, std=STD)
        self.path = folder / "model.onnx"
        export(self.served, self.path, shape=SHAPE, max_batch=MAX_BATCH)
        self.graph = onnx.load_model(self.path).graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("export"))


def sides(value: onnx.ValueInfoProto) -> list[int | str]:
    return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]


def test_pixels_go_in_and_answers_come_out_and_only_the_batch_is_free(exported: Exported) -> None:
    kind = onnx.TensorProto
    put = {
        value.name: (value.type.tensor_type.elem_type, sides(value))
        for value in [*exported.graph.input, *exported.graph.output]
    }
    assert put == {
        "pixels": (kind.UINT8, ["rows", *SHAPE]),
        "classes": (kind.INT32, ["rows", 10]),
        "scores": (kind.FLOAT, ["rows", 10]),
        "probabilities": (kind.FLOAT, ["rows", CLASSES]),
    }


def test_the_graph_holds_no_more_than_the_work(exported: Exported) -> None:
    assert Counter(node.op_type for node in exported.graph.node) == {
        "Cast": 2,  # pixels to float32, classes to int32
        "Mul": 1,
        "Add": 1,
        "Transpose": 1,
        "Conv": 1,  # with the batch norm in it
        "Relu": 1,
        "LRN": 1,
        "MaxPool": 1,
        "ReduceMean": 1,
        "Reshape": 3,  # to lines of pixels and back, and what follows a pool
        "Gemm": 1,
        "Softmax": 1,
        "TopK": 1,
    }
    first = exported.graph.node[0]
    assert (first.op_type, list(first.input)) == ("Cast", ["pixels"]), "TensorRT wants it first"


def test_the_file_tells_nothing_of_the_machine_it_was_made_on(exported: Exported) -> None:
    content = exported.path.read_bytes()
    assert str(Path(__file__).resolve().parent.parent.parent).encode() not in content
    assert b"site-packages" not in content
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]


def test_the_graph_answers_as_eager_pytorch_does_at_every_batch_size(exported: Exported) -> None:
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(exported.path, "CPU", settings)
    rng = np.random.default_rng(0)
    for rows in range(1, MAX_BATCH + 1):
        pixels = rng.integers(0, 256, (rows, *SHAPE), np.uint8)
        found = compiled(pixels)
        with torch.inference_mode():
            classes, scores, probabilities = exported.served(torch.from_numpy(pixels))
        assert np.array_equal(found["classes"], classes.numpy())
        np.testing.assert_allclose(found["scores"], scores.numpy(), atol=1e-5)
        np.testing.assert_allclose(found["probabilities"], probabilities.numpy(), atol=1e-5)


def test_eager_answers_are_the_best_first_and_add_up(exported: Exported) -> None:
    pixels = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    with torch.inference_mode():
        classes, scores, probabilities = exported.served(pixels)
    assert (classes.dtype, scores.dtype) == (torch.int32, torch.float32)
    assert torch.equal(probabilities.sort(descending=True).values[:, :10], scores)
    assert torch.equal(probabilities.gather(1, classes.long()), scores)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_with_fewer_classes_than_ten_all_of_them_are_told() -> None:
    served = Served(nn.Flatten(), classes=6, mean=(0.5,), std=(0.5,))
    classes, scores, _ = served(torch.zeros(2, 2, 3, 1, dtype=torch.uint8))
    assert classes.shape == scores.shape == (2, 6)


def test_normalisation_in_one_step_is_that_of_the_definition() -> None:
    class Logits(nn.Module):
        seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return x.flatten(1)

    network = Logits()
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    Served(network, classes=768, mean=MEAN, std=STD)(pixels)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - mean) / std
    torch.testing.assert_close(network.seen.double(), expected, atol=1e-6, rtol=0)


def test_exporting_says_nothing_and_leaves_the_network_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = nn.Sequential(nn.LocalResponseNorm(3), nn.Flatten())
    served = Served(body, classes=4 * 3, mean=(0.5,), std=(0.5,))
    level = logging.getLogger("torch.onnx").level
    export(served, tmp_path / "one.onnx", shape=(4, 3, 1), max_batch=1)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    assert type(body[0]) is nn.LocalResponseNorm
    probabilities = served(torch.ones(1, 4, 3, 1, dtype=torch.uint8))[2]
    assert probabilities.std() < 1e-6, "the operator that only stands for it would give garbage"


def test_a_network_that_can_not_be_traced_is_an_error_and_stays_as_it_was(tmp_path: Path) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LocalResponseNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x).flatten(1)
            return x if x.sum() > 0 else -x

    served = Served(Moody(), classes=12, mean=(0.5,), std=(0.5,))
    with pytest.raises(ExportError, match="data-dependent"):
        export(served, tmp_path / "moody.onnx", shape=(4, 3, 1), max_batch=2)
    assert not any(isinstance(module, OnnxLocalResponseNorm) for module in served.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_network_is_traced_in_half_precision_but_for_its_last_layer(
    precision: str, kind: torch.dtype
) -> None:
    served = Served(network(), classes=CLASSES, mean=MEAN, std=STD)
    program = traced(served, SHAPE, MAX_BATCH, precision, "cpu", usual=4)
    state = program.state_dict
    (last,) = (value for value in state.values() if value.shape == (CLASSES, 8))
    assert torch.equal(last, served.network.get_parameter("8.weight")), "it was not rounded"
    (convolution,) = (value for value in state.values() if value.dim() == 4)
    assert convolution.dtype == kind
    assert served.network.get_parameter("0.weight").dtype == torch.float32
    (rows,) = program.range_constraints.values()
    assert (rows.lower, rows.upper) == (1, MAX_BATCH)
