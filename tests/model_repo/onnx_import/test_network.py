"""A served graph made from an ONNX file computes what the file computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from model_repo.export import ServedNetwork, export
from model_repo.onnx_import.errors import UnusableGraph
from model_repo.onnx_import.network import OnnxNetwork
from tests.model_repo.onnx_import.graphs import (
    CHANNELS,
    CLASSES,
    HEIGHT,
    SHAPE,
    WIDTH,
    classifier,
    save,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
BYTES = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}


def pixels(rows: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return rng.integers(0, 256, (rows, HEIGHT, WIDTH, CHANNELS), np.uint8)


def served(folder: Path, model: onnx.ModelProto, **options: Any) -> ServedNetwork:
    network = OnnxNetwork(save(model, folder), SHAPE, options.pop("classes", CLASSES), "")
    normalisation = {"mean": MEAN, "std": STD} | options
    return ServedNetwork(network, top_k=2, **normalisation)


def exported(folder: Path, network: ServedNetwork, given: np.ndarray) -> list[np.ndarray]:
    """The outputs of the exported graph, by ONNX Runtime."""
    path = folder / "served.onnx"
    export(network, path, shape=SHAPE, max_batch=8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"pixels": given})
    return found


def truth(folder: Path, given: np.ndarray, *, last: bool, dtype: Any, scaled: bool) -> np.ndarray:
    """What the untouched file says, one image at a time, with preprocessing in NumPy."""
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"))
    x = given.astype(np.float64) if not scaled else (given / 255 - MEAN) / STD
    x = x if last else x.transpose(0, 3, 1, 2)
    rows = [session.run(None, {"image": row[np.newaxis].astype(dtype)})[0] for row in x]
    return np.concatenate(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = exponents / exponents.sum(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize(
    ("options", "described"),
    [
        ({}, "float32 [N, C, H, W], ends with logits"),
        ({"layout": "NHWC", "ending": "Softmax"}, "float32 [N, H, W, C], ends with softmax"),
        ({"batch": 1, "pooling": "Reshape"}, "ends with logits; its batch of 1 was made variable"),
        ({"ending": "sums", "opset": 13}, "ends with probabilities"),
        ({"opset": 11, "layout": "NHWC"}, "[N, H, W, C], ends with logits"),
        ({"dtype": TensorProto.FLOAT16}, "takes float16"),
        ({"dtype": TensorProto.UINT8, "layout": "NHWC"}, "takes uint8 [N, H, W, C]"),
    ],
    ids=["pytorch", "keras", "batch of 1", "own softmax", "old opset", "float16", "uint8"],
)
def test_the_served_graph_computes_what_the_file_computes(
    tmp_path: Path, options: dict[str, Any], described: str
) -> None:
    is_bytes = options.get("dtype") == TensorProto.UINT8
    network = served(tmp_path, classifier(**options), **(BYTES if is_bytes else {}))
    assert isinstance(network.network, OnnxNetwork)
    assert described in network.network.described()
    assert network.network.max_batch is None
    given = pixels(3)
    dtype = {TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
    expected = truth(
        tmp_path,
        given,
        last=options.get("layout") == "NHWC",
        dtype=dtype.get(options.get("dtype", 0), np.float32),
        scaled=not is_bytes,
    )
    if options.get("ending", "") == "":
        expected = softmax(expected)
    classes, scores, probabilities = exported(tmp_path, network, given)
    tolerance = 2e-3 if options.get("dtype") == TensorProto.FLOAT16 else 2e-5
    np.testing.assert_allclose(probabilities, expected, atol=tolerance)
    assert (classes[:, 0] == expected.argmax(axis=1)).all()
    np.testing.assert_allclose(scores[:, 0], expected.max(axis=1), atol=tolerance)
    with torch.inference_mode():
        reference = network(torch.from_numpy(given))[2].numpy()
    np.testing.assert_allclose(reference, expected, atol=tolerance)


def test_a_sigmoid_gives_each_class_its_own_probability(tmp_path: Path) -> None:
    network = served(tmp_path, classifier(ending="Sigmoid"), activation="sigmoid")
    given = pixels(3)
    expected = truth(tmp_path, given, last=False, dtype=np.float32, scaled=True)
    *_, probabilities = exported(tmp_path, network, given)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    assert isinstance(network.network, OnnxNetwork)
    with pytest.raises(UnusableGraph, match='write activation = "sigmoid"'):
        network.network.check_activation("softmax")


def test_one_score_is_that_of_the_second_of_two_classes(tmp_path: Path) -> None:
    network = served(tmp_path, classifier(classes=1, ending="Sigmoid"), classes=2)
    given = pixels(3)
    second = truth(tmp_path, given, last=False, dtype=np.float32, scaled=True)
    *_, probabilities = exported(tmp_path, network, given)
    np.testing.assert_allclose(probabilities, np.hstack([1 - second, second]), atol=2e-5)
    assert isinstance(network.network, OnnxNetwork)
    with pytest.raises(UnusableGraph, match="one score for two classes"):
        network.network.check_activation("sigmoid")


def test_a_graph_that_needs_its_batch_of_1_is_not_batched(tmp_path: Path) -> None:
    network = served(tmp_path, classifier(batch=1, pooling="over the batch", opset=13))
    assert isinstance(network.network, OnnxNetwork)
    assert network.network.max_batch == 1
    assert "images are not batched" in network.network.described()
    given = pixels(2)
    expected = softmax(truth(tmp_path, given, last=False, dtype=np.float32, scaled=True))
    with torch.inference_mode():
        reference = network(torch.from_numpy(given))[2].numpy()
    np.testing.assert_allclose(reference, expected, atol=2e-5)


def several_outputs() -> onnx.ModelProto:
    model = classifier(ending="Softmax")
    model.graph.output.append(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    )
    return model


def test_one_of_several_outputs_is_chosen_by_name(tmp_path: Path) -> None:
    path = save(several_outputs(), tmp_path)
    with pytest.raises(UnusableGraph, match=r'choose one in the card: output = "scores"'):
        OnnxNetwork(path, SHAPE, CLASSES, "")
    assert OnnxNetwork(path, SHAPE, CLASSES, "logits").ending == ""
    assert OnnxNetwork(path, SHAPE, CLASSES, "scores").ending == "softmax"
    with pytest.raises(UnusableGraph, match="has no output 'other'; its outputs are 'scores'"):
        OnnxNetwork(path, SHAPE, CLASSES, "other")


def two_inputs() -> onnx.ModelProto:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    return model


def boxes() -> onnx.ModelProto:
    """A detector: its output has a row of numbers for each box."""
    nodes = [helper.make_node("Identity", ["image"], ["boxes"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CHANNELS, HEIGHT, WIDTH])
        for name in ("image", "boxes")
    ]
    graph = helper.make_graph(nodes, "detector", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (two_inputs, SHAPE, r"has 2 inputs \('image': float32 \[\?, 3, 12, 10\]; 'size'"),
        (boxes, SHAPE, "is not a classifier: no output is"),
        (classifier, (24, WIDTH, CHANNELS), "so input.height must be 12, not 24"),
        (lambda: classifier(classes=7), SHAPE, "has 7 classes .*, but the labels name 4"),
        (lambda: classifier(dtype=TensorProto.INT32), SHAPE, "'image': int32 .* is needed"),
        (
            lambda: classifier(batch=2, pooling="over the batch", opset=13),
            SHAPE,
            "fails in ONNX Runtime|is not a classifier|works only with batches of 2",
        ),
    ],
    ids=["two inputs", "detector", "height", "classes", "integers", "batch of 2"],
)
def test_a_graph_that_cannot_be_served_is_explained(
    tmp_path: Path, model: Any, shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UnusableGraph, match=message):
        OnnxNetwork(save(model(), tmp_path), shape, CLASSES, "")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\x08\x07\x12"]
)
def test_a_file_that_is_no_onnx_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(UnusableGraph, match="is not a complete ONNX file") as caught:
        OnnxNetwork(path, SHAPE, CLASSES, "")
    assert "\n" not in str(caught.value)


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(
        classifier(), path, save_as_external_data=True, location="net.data", size_threshold=0
    )
    assert (tmp_path / "net.data").exists()
    first = OnnxNetwork(path, SHAPE, CLASSES, "")
    assert first.parameter_count == 8 * 3 * 9 + 8 * CLASSES + CLASSES
    data = bytearray((tmp_path / "net.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "net.data").write_bytes(data)
    assert OnnxNetwork(path, SHAPE, CLASSES, "").sha256 != first.sha256
    (tmp_path / "net.data").unlink()
    with pytest.raises(UnusableGraph, match=r"net\.data"):
        OnnxNetwork(path, SHAPE, CLASSES, "")
