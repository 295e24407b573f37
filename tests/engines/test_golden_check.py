"""Promises of the golden check: sound engines pass, and engines with the usual mistakes do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from server.engines import golden_check as golden
from server.engines.base import CompileOptions, Engine, Instance, OnDone, Outputs, backend, infer
from server.engines.golden_check import (
    GoldenMismatch,
    check,
    deviation,
    deviation_scale,
)
from server.images.input_spec import Pixels
from server.repository import reader
from server.repository.manifest import EngineRecord, FileRecord
from server.repository.reader import Golden

Probabilities = NDArray[np.float32]
openvino = backend("openvino")
CLASSES = 20
SHAPE = (4, 4, 3)
MAX_BATCH = 5


def outputs(probabilities: Probabilities) -> Outputs:
    """What an engine that finds these probabilities would give."""
    classes = np.argsort(-probabilities, axis=1, kind="stable")[:, :10].astype(np.int32)
    scores = np.take_along_axis(probabilities, classes, axis=1)
    return Outputs(classes, scores, probabilities)


class Computed:
    """An engine and its one instance: a function from [N, H, W, C] to outputs."""

    device = "test"
    units = 1

    def __init__(
        self,
        answer: Callable[[Pixels], Outputs],
        shape: tuple[int, ...] = SHAPE,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self.max_batch = max_batch
        self.pixels = np.zeros((max_batch, *shape), np.uint8)
        self.instances: Sequence[Instance] = [self]
        self.sizes: set[int] = set()
        self._answer = answer

    def start(self, rows: int, done: OnDone) -> None:
        self.sizes.add(rows)
        done(self._answer(self.pixels[:rows].copy()))

    def computed_rows(self, rows: int) -> int:
        return rows

    def close(self) -> None:
        pass


def softmax(logits: NDArray[np.float64]) -> Probabilities:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)


MATRIX = np.random.default_rng(0).normal(0, 0.3, (np.prod(SHAPE), CLASSES))


def network(pixels: Pixels) -> Probabilities:
    """A small classifier whose answers depend on the picture."""
    return softmax((pixels.reshape(len(pixels), -1) / 128 - 1) @ MATRIX)


@pytest.fixture
def truth() -> Golden:
    pixels = np.random.default_rng(1).integers(0, 256, (4, *SHAPE), np.uint8)
    return Golden(pixels, network(pixels))


# --- the yardstick ---------------------------------------------------------------------------


def test_the_answer_to_another_picture_is_all_the_way_off(truth: Golden) -> None:
    scale = deviation_scale(truth.probabilities)
    assert deviation(truth.probabilities, truth.probabilities, scale) == 0
    for shift in (1, 2, 3):
        assert deviation(truth.probabilities, np.roll(truth.probabilities, shift, 0), scale) >= 1


def test_knowing_nothing_is_all_the_way_off(truth: Golden) -> None:
    unsure = np.full_like(truth.probabilities, 1 / CLASSES)
    assert deviation(truth.probabilities, unsure, deviation_scale(truth.probabilities)) >= 1


def test_a_network_that_is_unsure_is_measured_as_finely_as_one_that_is_sure() -> None:
    logits = np.random.default_rng(2).normal(0, 1, (3, 1000))
    error = np.random.default_rng(3).normal(0, 0.01, (3, 1000))
    found = [
        deviation(
            softmax(k * logits), softmax(k * (logits + error)), deviation_scale(softmax(k * logits))
        )
        for k in (0.1, 1, 2)
    ]
    assert found == pytest.approx([0.01] * 3, rel=0.3)


def test_what_half_precision_loses_of_tiny_probabilities_is_forgiven() -> None:
    logits = np.random.default_rng(4).normal(0, 5, (4, 1000))
    probabilities = softmax(logits)
    assert probabilities.min() < 1e-12
    halves = probabilities.astype(np.float16).astype(np.float32)
    assert deviation(probabilities, halves, deviation_scale(probabilities)) < 0.01


def test_pictures_that_get_the_same_answer_are_no_yardstick_for_each_other() -> None:
    one, other = softmax(np.random.default_rng(5).normal(0, 1, (2, 8)))
    scale = deviation_scale(np.stack([one, one, other]))
    assert scale[0] == scale[1] > 0.1
    sure = np.tile(np.eye(8, dtype=np.float32)[:1], (2, 1))  # as the null engine answers
    assert deviation_scale(sure).min() > 1


# --- what is run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, {1}), (2, {1, 2}), (3, {1, 3}), (5, {1, 3, 5}), (16, {1, 3, 16})]
)
def test_batch_1_an_odd_batch_and_the_largest_are_checked(
    truth: Golden, max_batch: int, sizes: set[int]
) -> None:
    engine = Computed(lambda pixels: outputs(network(pixels)), max_batch=max_batch)
    assert check(engine, truth, "fp32") == dict.fromkeys(map(str, sorted(sizes)), 0)
    assert engine.sizes == sizes


def test_every_instance_is_checked(truth: Golden) -> None:
    engine = Computed(lambda pixels: outputs(network(pixels)))
    broken = Computed(lambda pixels: outputs(network(255 - pixels)))
    engine.instances = [engine, broken]
    with pytest.raises(GoldenMismatch):
        check(engine, truth, "bf16")


def test_a_refusal_says_by_how_much(truth: Golden) -> None:
    with pytest.raises(
        GoldenMismatch, match=r"at batch 1 an answer is \d+\.\d\d% of the way .* bf16 allows"
    ):
        check(Computed(lambda pixels: outputs(network(255 - pixels))), truth, "bf16")


# --- answers out of form ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a._replace(probabilities=a.probabilities[:, 1:]), "probabilities are float32"),
        (lambda a: a._replace(probabilities=a.probabilities[1:]), "probabilities are float32"),
        (lambda a: a._replace(probabilities=a.probabilities.astype(float)), "are float64"),
        (lambda a: a._replace(probabilities=a.probabilities * np.float32("nan")), "are none"),
        (lambda a: a._replace(probabilities=-a.probabilities), "numbers that are none"),
        (lambda a: a._replace(probabilities=a.probabilities * 2), r"add up to 2\.000"),
        (lambda a: a._replace(classes=a.classes.astype(np.int64)), "classes are int64"),
        (lambda a: a._replace(classes=a.classes[:, :5]), "classes are int32"),
        (lambda a: a._replace(classes=a.classes - 1), "classes reach from -1|scores are not"),
        (lambda a: a._replace(classes=a.classes + CLASSES), "classes reach from"),
        (lambda a: a._replace(classes=a.classes[:, ::-1]), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores[:, ::-1]), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores * np.float32(0.9)), "scores are not the largest"),
        (lambda a: a._replace(scores=a.scores * np.float32("nan")), "scores are not the largest"),
    ],
)
def test_answers_out_of_form_are_told(
    truth: Golden, spoil: Callable[[Outputs], Outputs], words: str
) -> None:
    with pytest.raises(GoldenMismatch, match=words):
        check(Computed(lambda pixels: spoil(outputs(network(pixels)))), truth, "bf16")


# --- mistakes of engines ---------------------------------------------------------------------


def mixed_up(engine: Engine) -> Callable[[Pixels], Outputs]:
    return lambda pixels: rows_of(infer(engine.instances[0], pixels), slice(None, None, -1))


def stale(engine: Engine) -> Callable[[Pixels], Outputs]:
    kept = [infer(engine.instances[0], engine.instances[0].pixels[:MAX_BATCH])]

    def answer(pixels: Pixels) -> Outputs:
        kept.append(infer(engine.instances[0], pixels))
        return rows_of(kept.pop(0), np.arange(len(pixels)) % len(kept[0].classes))

    return answer


def bleeding(engine: Engine) -> Callable[[Pixels], Outputs]:
    """A fifth of a row's answer is its neighbour's."""

    def answer(pixels: Pixels) -> Outputs:
        own = infer(engine.instances[0], pixels).probabilities
        return outputs(np.asarray(0.8 * own + 0.2 * np.roll(own, 1, 0), np.float32))

    return answer


def by_place(engine: Engine) -> Callable[[Pixels], Outputs]:
    """The last row of a full batch is never computed."""

    def answer(pixels: Pixels) -> Outputs:
        own = infer(engine.instances[0], pixels).probabilities
        if len(pixels) == engine.max_batch:
            own[-1] = 1 / own.shape[1]
        return outputs(own)

    return answer


def warmer(engine: Engine) -> Callable[[Pixels], Outputs]:
    """A softmax at half the temperature."""

    def answer(pixels: Pixels) -> Outputs:
        own = np.square(infer(engine.instances[0], pixels).probabilities.astype(float))
        return outputs(np.asarray(own / own.sum(axis=1, keepdims=True), np.float32))

    return answer


def seeing(change: Callable[[Pixels], Pixels]) -> Callable[[Engine], Callable[[Pixels], Outputs]]:
    return lambda engine: lambda pixels: infer(engine.instances[0], change(pixels))


def rows_of(answer: Outputs, rows: object) -> Outputs:
    return Outputs(*(array[rows] for array in answer))  # type: ignore[call-overload]


MISTAKES = {
    "blue first": seeing(lambda pixels: pixels[..., ::-1]),
    "columns for rows": seeing(lambda pixels: pixels.swapaxes(1, 2)),
    "upside down": seeing(lambda pixels: pixels[:, ::-1]),
    "half as bright": seeing(lambda pixels: pixels // 2),
    "another mean": seeing(lambda p: np.maximum(p.astype(int) - 30, 0).astype(np.uint8)),
    "rows mixed up": mixed_up,
    "the answers to the batch before": stale,
    "neighbours bleed": bleeding,
    "last row not computed": by_place,
    "temperature": warmer,
}


class Sound:
    """A model of the built repository, whose graph can be changed before it is loaded."""

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
def sound(
    request: pytest.FixtureRequest, built_repository: Path, tmp_path: Path
) -> tuple[Sound, str]:
    model, precision = request.param
    if precision not in openvino.precisions():
        pytest.skip(f"this machine has no {precision}")
    return Sound(built_repository, model, tmp_path), precision


def test_the_usual_mistakes_of_engines_are_found(sound: tuple[Sound, str]) -> None:
    model, precision = sound
    engine = model.load(precision)
    check(engine, model.golden, precision)
    shape = model.manifest.input.spec().shape
    missed = []
    for name, mistake in MISTAKES.items():
        if name == "blue first" and shape[2] == 1:
            continue
        try:
            check(Computed(mistake(engine), shape), model.golden, precision)
            missed.append(name)
        except GoldenMismatch:
            pass
    engine.close()
    assert not missed


def initializers(graph: onnx.GraphProto, operator: str, dimensions: int) -> list[onnx.TensorProto]:
    """The weights of all operators of a kind, in the graph's order."""
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
    rewrite(initializers(graph, "Mul", 1)[0], lambda scale: scale * 1.25)


def wrong_mean(graph: onnx.GraphProto) -> None:
    rewrite(initializers(graph, "Add", 1)[0], lambda offset: offset + 0.3)


def no_normalisation(graph: onnx.GraphProto) -> None:
    rewrite(initializers(graph, "Mul", 1)[0], np.ones_like)
    rewrite(initializers(graph, "Add", 1)[0], np.zeros_like)


def layer_rolled(graph: onnx.GraphProto) -> None:
    layers = initializers(graph, "Conv", 4)
    rewrite(layers[len(layers) // 2], lambda weights: np.roll(weights, 1, axis=0))


def layer_half_lost(graph: onnx.GraphProto) -> None:
    layers = initializers(graph, "Conv", 4)
    rewrite(
        layers[-1], lambda weights: weights * (np.arange(len(weights)) % 2)[:, None, None, None]
    )


def classes_shifted(graph: onnx.GraphProto) -> None:
    rewrite(initializers(graph, "Gemm", 2)[-1], lambda weights: np.roll(weights, 1, axis=0))


MISTRACED = (
    wrong_std,
    wrong_mean,
    no_normalisation,
    layer_rolled,
    layer_half_lost,
    classes_shifted,
)


def test_the_usual_mistakes_of_graphs_are_found(sound: tuple[Sound, str]) -> None:
    model, precision = sound
    missed = []
    for mistake in MISTRACED if precision == "bf16" else MISTRACED[:1]:
        engine = model.load(precision, mistake)
        try:
            check(engine, model.golden, precision)
            missed.append(mistake.__name__)
        except GoldenMismatch:
            pass
        engine.close()
    assert not missed


def test_what_bf16_loses_is_more_than_fp32_may_lose(built_repository: Path, tmp_path: Path) -> None:
    if "bf16" not in openvino.precisions():
        pytest.skip("this machine has no bf16")
    model = Sound(built_repository, "resnet18", tmp_path)
    engine = model.load("bf16")
    with pytest.raises(GoldenMismatch, match="fp32 allows"):
        check(engine, model.golden, "fp32")
    assert max(check(engine, model.golden, "bf16").values()) < golden.MAX_DEVIATION["bf16"]
    engine.close()
