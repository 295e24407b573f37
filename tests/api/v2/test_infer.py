"""Triton's own client gets from ModelInfer what Classify answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from server.api.stubs import classify_pb2
from server.api.stubs import open_inference_pb2 as pb
from server.errors import EngineFailure
from tests.api.v2.tensor_calls import (
    encoded,
    failure,
    image,
    infer,
    labels,
    png,
    rows,
    triton_client_of,
    typed,
)
from tests.support import triton_clients as triton
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SHAPE,
    Mirrors,
    loading,
    publish,
    raw,
    serve,
)
from tests.support.triton_clients import (
    InferInput,
    InferRequestedOutput,
)

TOP_K = 10


async def test_pixels_files_and_typed_contents_give_the_classes_of_classify(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [5, 2, 9]
    async with triton_client_of(tmp_path) as (served, client):
        answers = [
            await client.infer("tiny", image(rows(*of))),
            await client.infer("tiny", encoded(*map(png, of))),
        ]
        bare = await infer(served, typed(*of))
        classified = await served.classify(raw(*of, top_k=TOP_K))
    for answer in answers:
        response = answer.get_response()
        assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
            ("classes", "INT32", [3, TOP_K]),
            ("scores", "FP32", [3, TOP_K]),
            ("probabilities", "FP32", [3, CLASSES]),
        ]
        found = [[c for c, _ in row] for row in labels(classified)]
        assert answer.as_numpy("classes").tolist() == found
        best = answer.as_numpy("classes").astype(np.int64)
        probabilities = answer.as_numpy("probabilities")
        assert answer.as_numpy("scores")[:, 0].tolist() == [0.5, 0.5, 0.5]
        picked = np.take_along_axis(probabilities, best, axis=1)
        assert (picked == answer.as_numpy("scores")).all()
        assert list(response.raw_output_contents) == list(bare.raw_output_contents)
        assert (response.model_name, response.model_version) == ("tiny", "1")
        assert not response.parameters["trained"].bool_param


async def test_files_have_one_dimension_or_two(tmp_path: Path) -> None:
    publish(tmp_path)
    tensor = InferInput("encoded", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[png(4)], [png(8)]], dtype=object))
    async with triton_client_of(tmp_path) as (_, client):
        for tensors in ([tensor], encoded(png(4), png(8))):
            answer = await client.infer("tiny", tensors)
            assert answer.as_numpy("classes")[:, 0].tolist() == [4, 8]


async def test_with_both_inputs_the_pixels_are_classified_and_the_response_says_so(
    tmp_path: Path,
) -> None:
    # perf_analyzer sends such requests: it fills every input in the metadata with random data.
    publish(tmp_path)
    text = InferInput("encoded", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"no file"], [b"none"]], dtype=object))
    async with triton_client_of(tmp_path) as (_, client):
        for tensors in ([*image(rows(3, 7)), text], [text, *image(rows(3, 7))]):
            answer = await client.infer("tiny", tensors)
            assert answer.as_numpy("classes")[:, 0].tolist() == [3, 7]
            assert answer.get_response().parameters["passed_over"].string_param == "encoded"
        answer = await client.infer("tiny", image(rows(3)))
        assert "passed_over" not in answer.get_response().parameters
        short = image(rows(3, 7))
        short[0].set_shape([1, *SHAPE])
        _, why = await failure(client.infer("tiny", [text, *short]))
        assert "raw_input_contents[1]: has 288 bytes; 'image' of shape [1, 8, 6, 3] needs" in why


async def test_files_can_be_typed_contents(tmp_path: Path) -> None:
    publish(tmp_path)
    contents = pb.InferTensorContents(bytes_contents=[png(4), png(8)])
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="encoded", datatype="BYTES", shape=[2], contents=contents
    )
    async with triton_client_of(tmp_path) as (served, _):
        answer = await infer(served, pb.ModelInferRequest(model_name="tiny", inputs=[tensor]))
    classes = np.frombuffer(answer.raw_output_contents[0], "<i4").reshape(2, TOP_K)
    assert classes[:, 0].tolist() == [4, 8]


async def test_only_requested_outputs_are_sent_in_their_order(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (_, client):
        for names in (["probabilities", "classes"], ["scores"], ["classes", "scores"]):
            outputs = [InferRequestedOutput(name) for name in names]
            answer = await client.infer("tiny", image(rows(1)), outputs=outputs)
            response = answer.get_response()
            assert [output.name for output in response.outputs] == names
            assert len(response.raw_output_contents) == len(names)
            for name in names:
                assert answer.as_numpy(name) is not None


@pytest.mark.parametrize("output", ["scores", "probabilities"])
async def test_classification_returns_the_classes_of_classify_as_texts(
    tmp_path: Path, output: str
) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (served, client):
        wanted = [InferRequestedOutput("classes"), InferRequestedOutput(output, class_count=3)]
        answer = await client.infer("tiny", image(rows(7, 11)), outputs=wanted)
        classified = await served.classify(raw(7, 11, top_k=3))
    texts = answer.as_numpy(output)
    assert texts.shape == (2, 3)
    expected = [
        [f"{c.probability:f}:{c.index}:{c.label}".encode() for c in result.classes]
        for result in classified.results
    ]
    assert texts.tolist() == expected
    assert expected[0][0] == b"0.500000:7:class 7"
    assert answer.as_numpy("classes").shape == (2, TOP_K)


async def test_classification_can_return_all_classes(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (_, client):
        wanted = [
            InferRequestedOutput("probabilities", class_count=CLASSES),
            InferRequestedOutput("scores", class_count=TOP_K),
        ]
        answer = await client.infer("tiny", image(rows(7, 11)), outputs=wanted)
    texts = answer.as_numpy("probabilities").astype(str)
    assert texts.shape == (2, CLASSES)
    assert (texts[:, :TOP_K] == answer.as_numpy("scores").astype(str)).all()
    for row in texts:
        found = [text.split(":") for text in row]
        assert sorted(int(index) for _, index, _ in found) == list(range(CLASSES))
        probabilities = [float(score) for score, _, _ in found]
        assert probabilities == sorted(probabilities, reverse=True)


async def test_the_id_is_returned_and_the_version_can_be_given(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (_, client):
        for version in ("", "1"):
            answer = await client.infer(
                "tiny", image(rows(3)), model_version=version, request_id="mine"
            )
            assert answer.get_response().id == "mine"
            assert answer.get_response().model_version == "1"


async def test_a_request_larger_than_a_batch_is_answered_whole_and_in_order(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [(7 * n + 3) % CLASSES for n in range(10)]
    async with triton_client_of(tmp_path) as (_, client):
        for tensors in (image(rows(*of)), encoded(*map(png, of))):
            answer = await client.infer("tiny", tensors)
            assert answer.as_numpy("classes")[:, 0].tolist() == of


async def test_a_real_engine_returns_what_classify_returns(built_repository: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    images = classify_pb2.RawImages(
        count=3, height=224, width=224, channels=3, data=pixels.tobytes()
    )
    request = classify_pb2.ClassifyRequest(model="resnet18", pixels=images, top_k=TOP_K)
    async with (
        serve(built_repository, models="resnet18,lenet5") as served,
        triton.aio.InferenceServerClient(served.target) as client,
    ):
        classified = await served.classify(request)
        texts = [InferRequestedOutput("scores", class_count=TOP_K)]
        answer = await client.infer("resnet18", image(pixels))
        named = await client.infer("resnet18", image(pixels), outputs=texts)
        digit = await client.infer("lenet5", image(np.zeros((1, 32, 32, 1), np.uint8)))
    found = labels(classified)
    assert answer.as_numpy("classes").tolist() == [[c for c, _ in row] for row in found]
    for row, expected in zip(named.as_numpy("scores"), found, strict=True):
        split = [text.decode().split(":", 2) for text in row]
        assert [(int(index), label) for _, index, label in split] == expected
    assert answer.as_numpy("probabilities").sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-3)
    assert digit.get_response().parameters["trained"].bool_param


async def test_priority_one_is_the_most_urgent_and_none_the_least(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with triton_client_of(tmp_path, load=loading(engines)) as (served, client):
        (model,) = served.server.registry.serving_models()
        calls = [asyncio.create_task(client.infer("tiny", image(rows(0))))]
        await engines.made[0].started.wait()
        for count, priority in enumerate((0, 9, 2, 1), start=1):
            tensors = image(rows(*[priority] * MAX_BATCH))
            calls.append(asyncio.create_task(client.infer("tiny", tensors, priority=priority)))
            while model.executor.queued_rows("tiny/1") < count * MAX_BATCH:
                await asyncio.sleep(0.001)
        engines.made[0].release()
        await asyncio.gather(*calls)
    assert engines.made[0].batches == [0, 1, 2, 9, 0]


async def test_a_timeout_refuses_requests_that_cannot_be_in_time(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (_, client):
        code, _ = await failure(client.infer("tiny", image(rows(1)), timeout=1))
        assert code == "DEADLINE_EXCEEDED"
        for timeout in (0, 20_000_000):
            answer = await client.infer("tiny", image(rows(1)), timeout=timeout)
            assert answer.as_numpy("classes")[0, 0] == 1


async def test_the_deadline_of_the_call_applies_too(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with triton_client_of(tmp_path, load=loading(engines)) as (_, client):
        call = client.infer("tiny", image(rows(1)), client_timeout=0.2)
        assert (await failure(call))[0] == "DEADLINE_EXCEEDED"
        engines.made[0].release()


async def test_a_failing_engine_is_an_internal_error(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with triton_client_of(tmp_path, load=loading(engines)) as (_, client):
        engines.made[0].failure = EngineFailure("secret")
        code, message = await failure(client.infer("tiny", image(rows(1))))
    assert code == "INTERNAL"
    assert "secret" not in message
