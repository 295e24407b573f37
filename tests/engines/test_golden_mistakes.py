"""The golden check finds common mistakes in engines and in graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from server.engines import golden_check as golden
from server.engines.base import CompileOptions, Engine, Outputs, backend, infer
from server.engines.golden_check import (
    GoldenMismatch,
    check,
)
from server.images.input_spec import Pixels
from server.repository import reader
from server.repository.manifest import EngineRecord, FileRecord
from tests.support.fakes.function_engine import MAX_BATCH, FunctionEngine, outputs

openvino = backend("openvino")


def rows_reversed(engine: Engine) -> Callable[[Pixels], Outputs]:
    return lambda pixels: rows_of(infer(engine.instances[0], pixels), slice(None, None, -1))


def stale(engine: Engine) -> Callable[[Pixels], Outputs]:
    """Returns the outputs of the batch before."""
    kept = [infer(engine.instances[0], engine.instances[0].pixels[:MAX_BATCH])]

    def answer(pixels: Pixels) -> Outputs:
        kept.append(infer(engine.instances[0], pixels))
        return rows_of(kept.pop(0), np.arange(len(pixels)) % len(kept[0].classes))

    return answer


def mixed_with_neighbour(engine: Engine) -> Callable[[Pixels], Outputs]:
    """A fifth of each row comes from its neighbour."""

    def answer(pixels: Pixels) -> Outputs:
        own = infer(engine.instances[0], pixels).probabilities
        return outputs(np.asarray(0.8 * own + 0.2 * np.roll(own, 1, 0), np.float32))

    return answer


def last_row_missing(engine: Engine) -> Callable[[Pixels], Outputs]:
    """The last row of a full batch is never computed."""

    def answer(pixels: Pixels) -> Outputs:
        own = infer(engine.instances[0], pixels).probabilities
        if len(pixels) == engine.max_batch:
            own[-1] = 1 / own.shape[1]
        return outputs(own)

    return answer


def wrong_temperature(engine: Engine) -> Callable[[Pixels], Outputs]:
    """A softmax at half the temperature."""

    def answer(pixels: Pixels) -> Outputs:
        own = np.square(infer(engine.instances[0], pixels).probabilities.astype(float))
        return outputs(np.asarray(own / own.sum(axis=1, keepdims=True), np.float32))

    return answer


def with_input(
    change: Callable[[Pixels], Pixels],
) -> Callable[[Engine], Callable[[Pixels], Outputs]]:
    return lambda engine: lambda pixels: infer(engine.instances[0], change(pixels))


def rows_of(answer: Outputs, rows: object) -> Outputs:
    return Outputs(*(array[rows] for array in answer))  # type: ignore[call-overload]


MISTAKES = {
    "BGR instead of RGB": with_input(lambda pixels: pixels[..., ::-1]),
    "height and width swapped": with_input(lambda pixels: pixels.swapaxes(1, 2)),
    "upside down": with_input(lambda pixels: pixels[:, ::-1]),
    "half the brightness": with_input(lambda pixels: pixels // 2),
    "wrong mean": with_input(lambda p: np.maximum(p.astype(int) - 30, 0).astype(np.uint8)),
    "rows in reverse order": rows_reversed,
    "the outputs of the batch before": stale,
    "rows mixed with their neighbour": mixed_with_neighbour,
    "last row not computed": last_row_missing,
    "wrong temperature": wrong_temperature,
}


class BuiltModel:
    """A model of the built repository. Its graph can be changed before it is loaded."""

    def __init__(self, root: Path, model: str, folder: Path) -> None:
        self.folder = folder
        self.version = root / model / "1"
        self.manifest, _, self.golden = reader.open_version(self.version)

    def load(
        self, precision: str, change: Callable[[onnx.GraphProto], None] | None = None
    ) -> Engine:
        graph = onnx.load_model(self.version / "model.onnx")
        if change is not None:
            change(graph.graph)
        onnx.save_model(graph, self.folder / "changed.onnx")
        compiled = openvino.compile(
            self.folder / "changed.onnx", self.folder, CompileOptions(precision, MAX_BATCH)
        )
        record = EngineRecord(
            name="changed",
            backend="openvino",
            backend_version=openvino.version(),
            precision=precision,
            hardware="",
            max_batch=MAX_BATCH,
            files=tuple(FileRecord(name=name, bytes=0, sha256="0" * 64) for name in compiled.files),
            deviation={},
        )
        return openvino.load(self.folder, record, self.manifest.input.spec().shape, threads=1)


@pytest.fixture(
    params=[("lenet5", "fp32"), ("lenet5", "bf16"), ("resnet18", "fp32"), ("resnet18", "bf16")],
    ids="-".join,
)
def built_model(
    request: pytest.FixtureRequest, built_repository: Path, tmp_path: Path
) -> tuple[BuiltModel, str]:
    model, precision = request.param
    if precision not in openvino.precisions():
        pytest.skip(f"this machine has no {precision}")
    return BuiltModel(built_repository, model, tmp_path), precision


def test_common_mistakes_of_engines_are_found(built_model: tuple[BuiltModel, str]) -> None:
    model, precision = built_model
    engine = model.load(precision)
    check(engine, model.golden, precision)
    shape = model.manifest.input.spec().shape
    missed = []
    for name, mistake in MISTAKES.items():
        if name == "BGR instead of RGB" and shape[2] == 1:
            continue
        try:
            check(FunctionEngine(mistake(engine), shape), model.golden, precision)
            missed.append(name)
        except GoldenMismatch:
            pass
    engine.close()
    assert not missed


def weights_of(graph: onnx.GraphProto, operator: str, dimensions: int) -> list[onnx.TensorProto]:
    """The weights of all operators of one type, in graph order."""
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    return [
        by_name[name]
        for node in graph.node
        if node.op_type == operator
        for name in node.input
        if name in by_name and len(by_name[name].dims) == dimensions
    ]


def rewrite(
    tensor: onnx.TensorProto, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    changed = np.ascontiguousarray(change(numpy_helper.to_array(tensor)), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


def wrong_std(graph: onnx.GraphProto) -> None:
    rewrite(weights_of(graph, "Mul", 1)[0], lambda scale: scale * 1.25)


def wrong_mean(graph: onnx.GraphProto) -> None:
    rewrite(weights_of(graph, "Add", 1)[0], lambda offset: offset + 0.3)


def no_normalisation(graph: onnx.GraphProto) -> None:
    rewrite(weights_of(graph, "Mul", 1)[0], np.ones_like)
    rewrite(weights_of(graph, "Add", 1)[0], np.zeros_like)


def rolled_layer(graph: onnx.GraphProto) -> None:
    layers = weights_of(graph, "Conv", 4)
    rewrite(layers[len(layers) // 2], lambda weights: np.roll(weights, 1, axis=0))


def half_lost_layer(graph: onnx.GraphProto) -> None:
    layers = weights_of(graph, "Conv", 4)
    rewrite(
        layers[-1], lambda weights: weights * (np.arange(len(weights)) % 2)[:, None, None, None]
    )


def shifted_classes(graph: onnx.GraphProto) -> None:
    rewrite(weights_of(graph, "Gemm", 2)[-1], lambda weights: np.roll(weights, 1, axis=0))


GRAPH_MISTAKES = (
    wrong_std,
    wrong_mean,
    no_normalisation,
    rolled_layer,
    half_lost_layer,
    shifted_classes,
)


def test_common_mistakes_of_graphs_are_found(built_model: tuple[BuiltModel, str]) -> None:
    model, precision = built_model
    missed = []
    for mistake in GRAPH_MISTAKES if precision == "bf16" else GRAPH_MISTAKES[:1]:
        engine = model.load(precision, mistake)
        try:
            check(engine, model.golden, precision)
            missed.append(mistake.__name__)
        except GoldenMismatch:
            pass
        engine.close()
    assert not missed


def test_bf16_rounding_exceeds_the_limit_of_fp32(built_repository: Path, tmp_path: Path) -> None:
    if "bf16" not in openvino.precisions():
        pytest.skip("this machine has no bf16")
    model = BuiltModel(built_repository, "resnet18", tmp_path)
    engine = model.load("bf16")
    with pytest.raises(GoldenMismatch, match="fp32 allows"):
        check(engine, model.golden, "fp32")
    assert max(check(engine, model.golden, "bf16").values()) < golden.MAX_DEVIATION["bf16"]
    engine.close()
