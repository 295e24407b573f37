"""Triton's own client, unchanged, gets from GRPCInferenceService what Classify answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image

from server.api.stubs import classify_pb2
from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.messages import small_numbers
from server.api.v2.metadata import EXTENSIONS
from server.errors import EngineFailure, InvalidInput
from server.images.input_spec import Pixels
from tests.support import triton_clients as triton
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SHAPE,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    raw,
    serve,
)
from tests.support.triton_clients import (
    InferenceServerException,
    InferInput,
    InferRequestedOutput,
    service_pb2,
)

OPEN_INFERENCE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
TOP_K = 10


def rows(*classes: int) -> Pixels:
    """Pixels that a Mirror finds to be of those classes; other bytes have every value."""
    pixels = np.arange(len(classes) * np.prod(SHAPE), dtype=np.uint8).reshape(-1, *SHAPE)
    pixels[:, 0, 0, 0] = classes
    return pixels


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(rows(index)[0]).save(file, "PNG")
    return file.getvalue()


def image(pixels: Any) -> list[InferInput]:
    tensor = InferInput("image", pixels.shape, "UINT8")
    tensor.set_data_from_numpy(pixels)
    return [tensor]


def encoded(*files: bytes) -> list[InferInput]:
    tensor = InferInput("encoded", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object))
    return [tensor]


def typed(*classes: int, **fields: Any) -> Any:
    """A request whose pixels are in uint_contents, which Triton's client can't make."""
    pixels = rows(*classes)
    contents = pb.InferTensorContents(uint_contents=pixels.reshape(-1).tolist())
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="image", datatype="UINT8", shape=pixels.shape, contents=contents
    )
    usual: dict[str, Any] = {"model_name": "tiny", "inputs": [tensor]}
    return pb.ModelInferRequest(**usual | fields)


def raw_bytes(data: bytes, shape: Sequence[int], name: str = "image", kind: str = "UINT8") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=kind, shape=shape)
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[data])


async def ask(served: Served, method: str, request: Any) -> Any:
    """A call without a client between; returns the bytes of the answer."""
    unary: Any = served.channel.unary_unary
    call = unary(f"/{OPEN_INFERENCE.full_name}/{method}")
    return await call(request.SerializeToString(), timeout=20)


async def infer(served: Served, request: Any) -> Any:
    return pb.ModelInferResponse.FromString(await ask(served, "ModelInfer", request))


async def refused(served: Served, request: Any) -> str:
    """What an INVALID_ARGUMENT says of that request."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(served, request)
    assert caught.value.code() == StatusCode.INVALID_ARGUMENT
    return caught.value.details() or ""


async def failure(call: Any) -> tuple[str, str]:
    """The status and the message of what Triton's client raises."""
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


@asynccontextmanager
async def asking(repo: Path, **options: Any) -> AsyncIterator[tuple[Served, Any]]:
    """A server of Mirrors, and Triton's asyncio client of it."""
    usual: dict[str, Any] = {"load": loading(Mirror)}
    async with (
        serve(repo, **usual | options) as served,
        triton.aio.InferenceServerClient(served.target) as client,
    ):
        yield served, client


def labels(answer: Any) -> list[list[tuple[int, str]]]:
    """Index and label of each class of each image in Classify's answer."""
    return [[(c.index, c.label) for c in result.classes] for result in answer.results]


# --- what is promised ------------------------------------------------------------------------


async def test_pixels_files_and_typed_contents_give_the_same_as_classify(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [5, 2, 9]
    async with asking(tmp_path) as (served, client):
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


async def test_files_stand_in_one_dimension_or_in_two(tmp_path: Path) -> None:
    publish(tmp_path)
    tensor = InferInput("encoded", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[png(4)], [png(8)]], dtype=object))
    async with asking(tmp_path) as (_, client):
        for tensors in ([tensor], encoded(png(4), png(8))):
            answer = await client.infer("tiny", tensors)
            assert answer.as_numpy("classes")[:, 0].tolist() == [4, 8]


async def test_of_a_call_with_both_inputs_the_pixels_are_classified_and_that_is_told(
    tmp_path: Path,
) -> None:
    # As perf_analyzer asks: it fills every input that the metadata names, files with random text.
    publish(tmp_path)
    text = InferInput("encoded", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"no file"], [b"none"]], dtype=object))
    async with asking(tmp_path) as (_, client):
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


async def test_files_come_as_typed_contents_too(tmp_path: Path) -> None:
    publish(tmp_path)
    contents = pb.InferTensorContents(bytes_contents=[png(4), png(8)])
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="encoded", datatype="BYTES", shape=[2], contents=contents
    )
    async with asking(tmp_path) as (served, _):
        answer = await infer(served, pb.ModelInferRequest(model_name="tiny", inputs=[tensor]))
    classes = np.frombuffer(answer.raw_output_contents[0], "<i4").reshape(2, TOP_K)
    assert classes[:, 0].tolist() == [4, 8]


async def test_only_the_outputs_asked_for_are_sent_in_the_order_asked(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (_, client):
        for names in (["probabilities", "classes"], ["scores"], ["classes", "scores"]):
            outputs = [InferRequestedOutput(name) for name in names]
            answer = await client.infer("tiny", image(rows(1)), outputs=outputs)
            response = answer.get_response()
            assert [output.name for output in response.outputs] == names
            assert len(response.raw_output_contents) == len(names)
            for name in names:
                assert answer.as_numpy(name) is not None


@pytest.mark.parametrize("output", ["scores", "probabilities"])
async def test_classification_gives_the_classes_of_classify_as_text(
    tmp_path: Path, output: str
) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (served, client):
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


async def test_classification_may_ask_for_all_classes(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (_, client):
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


async def test_the_id_comes_back_and_the_version_may_be_named(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (_, client):
        for version in ("", "1"):
            answer = await client.infer(
                "tiny", image(rows(3)), model_version=version, request_id="mine"
            )
            assert answer.get_response().id == "mine"
            assert answer.get_response().model_version == "1"


async def test_a_call_larger_than_a_batch_is_answered_whole_and_in_order(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [(7 * n + 3) % CLASSES for n in range(10)]
    async with asking(tmp_path) as (_, client):
        for tensors in (image(rows(*of)), encoded(*map(png, of))):
            answer = await client.infer("tiny", tensors)
            assert answer.as_numpy("classes")[:, 0].tolist() == of


async def test_the_plain_client_gets_everything_too(tmp_path: Path) -> None:
    publish(tmp_path)

    def tour(target: str) -> None:
        with triton.sync.InferenceServerClient(target) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("tiny")
            assert client.is_model_ready("tiny", "1")
            assert not client.is_model_ready("tiny", "2")
            assert not client.is_model_ready("other")
            assert client.get_server_metadata().name == "convserve"
            assert client.get_model_metadata("tiny").name == "tiny"
            assert client.get_model_config("tiny").config.name == "tiny"
            assert [m.name for m in client.get_model_repository_index().models] == ["tiny"]
            answer = client.infer("tiny", image(rows(6)), client_timeout=20)
            assert answer.as_numpy("classes")[0, 0] == 6
            later: Any = client.async_infer("tiny", image(rows(8)), lambda result, error: None)
            assert later is not None
            (stats,) = client.get_inference_statistics("tiny").model_stats
            assert stats.inference_count >= 1
            with pytest.raises(InferenceServerException, match="--model-control explicit"):
                client.load_model("tiny")
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
                client.get_system_shared_memory_status()

    async with serve(tmp_path, load=loading(Mirror)) as served:
        await asyncio.to_thread(tour, served.target)


async def test_metadata_and_config_say_what_the_tensors_are(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (_, client):
        server = await client.get_server_metadata()
        found = await client.get_model_metadata("tiny")
        config = (await client.get_model_config("tiny", "1")).config
    assert list(server.extensions) == list(EXTENSIONS)
    assert server.version
    assert (found.name, list(found.versions)) == ("tiny", ["1"])
    assert {t.name: (t.datatype, list(t.shape)) for t in [*found.inputs, *found.outputs]} == {
        "image": ("UINT8", [-1, *SHAPE]),
        "encoded": ("BYTES", [-1, 1]),
        "classes": ("INT32", [-1, TOP_K]),
        "scores": ("FP32", [-1, TOP_K]),
        "probabilities": ("FP32", [-1, CLASSES]),
    }
    assert (config.name, config.backend) == ("tiny", "null")
    assert config.max_batch_size == 256, "what a call may bring"
    assert config.parameters["engine_max_batch"].string_value == str(MAX_BATCH)
    assert config.platform == found.platform == "convserve_null"
    kinds = {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING", "INT32": "TYPE_INT32"}
    for tensor, described in zip(
        [*config.input, *config.output], [*found.inputs, *found.outputs], strict=True
    ):
        assert tensor.name == described.name
        assert [-1, *tensor.dims] == list(described.shape)
        kind = kinds.get(described.datatype, "TYPE_FP32")
        assert (
            type(config.input[0])
            .DESCRIPTOR.fields_by_name["data_type"]
            .enum_type.values_by_name[kind]
            .number
            == tensor.data_type
        )
    assert [tensor.optional for tensor in config.input] == [True, True]
    assert config.parameters["trained"].string_value == "false"
    assert config.HasField("dynamic_batching")


async def test_statistics_count_calls_images_and_batches_of_every_protocol(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    publish(tmp_path, "other")
    async with asking(tmp_path) as (served, client):
        before = (await client.get_inference_statistics("tiny")).model_stats[0]
        assert (before.inference_count, before.last_inference) == (0, 0)
        await client.infer("tiny", image(rows(*range(MAX_BATCH))))
        await client.infer("tiny", encoded(png(2)))
        await served.classify(raw(3))
        await failure(client.infer("tiny", encoded(b"no image")))
        after = (await client.get_inference_statistics("tiny", "1")).model_stats[0]
        everything = (await client.get_inference_statistics()).model_stats
    assert after.inference_count == MAX_BATCH + 2
    assert after.execution_count == 3
    assert after.last_inference > 1_600_000_000_000
    stats = after.inference_stats
    assert stats.success.count == stats.queue.count == stats.compute_infer.count == 3
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert stats.success.ns == pytest.approx(sum(part.ns for part in parts), abs=10)
    assert stats.compute_infer.ns > 0
    assert stats.fail.count == 1
    of_batches = {one.batch_size: one.compute_infer for one in after.batch_stats}
    assert {rows: spent.count for rows, spent in of_batches.items()} == {MAX_BATCH: 1, 1: 2}
    assert all(spent.ns > 0 for spent in of_batches.values())
    assert [(stats.name, stats.version) for stats in everything] == [("other", "1"), ("tiny", "1")]


async def test_the_index_lists_what_is_there_and_what_answers(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with asking(tmp_path) as (served, client):
        index = (await client.get_model_repository_index()).models
        only_ready = service_pb2.RepositoryIndexRequest(ready=True)
        answer = await ask(served, "RepositoryIndex", only_ready)
        ready = service_pb2.RepositoryIndexResponse.FromString(answer).models
        assert await client.is_model_ready("tiny", "2")
        assert not await client.is_model_ready("tiny", "1")
        code, message = await failure(client.infer("tiny", image(rows(1)), model_version="1"))
    assert [(m.name, m.version, m.state) for m in index] == [
        ("tiny", "2", "READY"),
        ("tiny", "1", "UNAVAILABLE"),
    ]
    assert index[1].reason == "version 2 is served"
    assert [(m.version, m.state) for m in ready] == [("2", "READY")]
    assert code == "UNAVAILABLE"
    assert "version 1" in message


async def test_a_real_engine_answers_as_it_does_for_classify(built_repository: Path) -> None:
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


# --- how urgent a call is --------------------------------------------------------------------


async def test_one_is_the_most_urgent_priority_and_none_is_the_least(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with asking(tmp_path, load=loading(engines)) as (served, client):
        (ready,) = served.server.registry.serving_models()
        calls = [asyncio.create_task(client.infer("tiny", image(rows(0))))]
        await engines.made[0].started.wait()
        for count, priority in enumerate((0, 9, 2, 1), start=1):
            tensors = image(rows(*[priority] * MAX_BATCH))
            calls.append(asyncio.create_task(client.infer("tiny", tensors, priority=priority)))
            while ready.executor.queued_rows("tiny/1") < count * MAX_BATCH:
                await asyncio.sleep(0.001)
        engines.made[0].release()
        await asyncio.gather(*calls)
    assert engines.made[0].batches == [0, 1, 2, 9, 0]


async def test_a_timeout_refuses_what_cannot_be_in_time(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (_, client):
        code, _ = await failure(client.infer("tiny", image(rows(1)), timeout=1))
        assert code == "DEADLINE_EXCEEDED"
        for timeout in (0, 20_000_000):
            answer = await client.infer("tiny", image(rows(1)), timeout=timeout)
            assert answer.as_numpy("classes")[0, 0] == 1


async def test_the_deadline_of_the_call_counts_too(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with asking(tmp_path, load=loading(engines)) as (_, client):
        call = client.infer("tiny", image(rows(1)), client_timeout=0.2)
        assert (await failure(call))[0] == "DEADLINE_EXCEEDED"
        engines.made[0].release()


# --- what is refused -------------------------------------------------------------------------


async def test_wrong_tensors_are_refused_by_name_and_with_what_is_allowed(tmp_path: Path) -> None:
    publish(tmp_path)
    height, width, channels = SHAPE
    shape, data = [1, *SHAPE], rows(1).tobytes()
    needed = f"[images, {height}, {width}, {channels}]"
    float_contents = pb.InferTensorContents(fp32_contents=[0.0])
    contents = pb.InferTensorContents(uint_contents=[0])
    with_both = raw_bytes(data, shape)
    with_both.inputs[0].contents.CopyFrom(contents)
    two = raw_bytes(data, shape)
    two.inputs.add(name="image", datatype="UINT8", shape=shape)
    files_missing = raw_bytes(data, shape)
    files_missing.inputs.add(name="encoded", datatype="BYTES", shape=[1])
    twice = raw_bytes(data, shape)
    twice.raw_input_contents.append(data)
    floats = typed(1)
    floats.inputs[0].contents.CopyFrom(float_contents)
    short = typed(1)
    short.inputs[0].contents.CopyFrom(contents)
    large = typed(1)
    large.inputs[0].contents.uint_contents[5] = 256
    shared = raw_bytes(data, shape)
    shared.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    file = png(1)
    element = len(file).to_bytes(4, "little") + file
    cases = [
        (raw_bytes(data, shape, "pixels"), "inputs[0].name: is 'pixels'; image or encoded"),
        (raw_bytes(data, shape, kind="FP32"), "'image' is 'FP32'; UINT8 is needed"),
        (raw_bytes(data, [1, 8, 6]), f"'image' is [1, 8, 6]; {needed} is needed"),
        (raw_bytes(data, []), f"'image' is []; {needed} is needed"),
        (raw_bytes(data, SHAPE), f"'image' is [8, 6, 3]; {needed} is needed"),
        (raw_bytes(data, [-1, *SHAPE]), "inputs[0].shape[0]: is -1; a request brings 1 to 256"),
        (raw_bytes(b"", [0, *SHAPE]), "inputs[0].shape[0]: is 0; a request brings 1 to 256"),
        (raw_bytes(data, [1 << 62, *SHAPE]), "a request brings 1 to 256"),
        (raw_bytes(data, [2, *SHAPE]), "has 144 bytes; 'image' of shape [2, 8, 6, 3] needs 288"),
        (raw_bytes(data[:-1], shape), "has 143 bytes; 'image' of shape [1, 8, 6, 3] needs 144"),
        (two, "inputs: has 2 tensors; one is needed: image or encoded"),
        (files_missing, "has 1 entries; two are needed, for 'image' and 'encoded'"),
        (pb.ModelInferRequest(model_name="tiny"), "inputs: has 0 tensors"),
        (with_both, "raw_input_contents: is given, and the contents of 'image' too"),
        (twice, "raw_input_contents: has 2 entries; one is needed, for 'image'"),
        (
            pb.ModelInferRequest(model_name="tiny", inputs=raw_bytes(data, shape).inputs),
            "raw_input_contents: has 0 entries; one is needed, for 'image'",
        ),
        (floats, "fp32_contents: is given; 'image' is UINT8, which comes in uint_contents"),
        (short, "uint_contents: has 1 elements; 'image' of shape [1, 8, 6, 3] needs 144"),
        (large, "uint_contents: has a number above 255"),
        (shared, "shared memory is not served without --allow-shared-memory"),
        (raw_bytes(element, [2], "encoded", "BYTES"), "1 or more elements; 'encoded' of shape [2]"),
        (raw_bytes(3 * element, [2], "encoded", "BYTES"), "3 or more elements"),
        (raw_bytes(element[:-1], [1], "encoded", "BYTES"), "left for element 0; its length says"),
        (raw_bytes(element + b"abc", [2], "encoded", "BYTES"), "within the length of element 1"),
        (raw_bytes(element, [1], "encoded", "UINT8"), "'encoded' is 'UINT8'; BYTES is needed"),
        (
            raw_bytes(element, [1, 2], "encoded", "BYTES"),
            "'encoded' is [1, 2]; [images] or [images, 1] is needed",
        ),
        (
            raw_bytes(element + b"\5\0\0\0other", [2], "encoded", "BYTES"),
            "raw_input_contents[0][1]: the file of 5 bytes",
        ),
    ]
    async with asking(tmp_path) as (served, _):
        for request, words in cases:
            assert words in await refused(served, request)
        assert await infer(served, raw_bytes(data, shape))  # and nothing was left behind
        bare = typed(1)
        bare.inputs.add(name="encoded", datatype="BYTES", shape=[1])
        assert await infer(served, bare)  # what is passed over may be nowhere


async def test_wrong_outputs_parameters_and_names_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    tensors = image(rows(1))
    async with asking(tmp_path) as (_, client):

        async def outputs(*wanted: Any) -> tuple[str, str]:
            return await failure(client.infer("tiny", tensors, outputs=list(wanted)))

        cases = [
            (await outputs(InferRequestedOutput("logits")), "classes, scores, probabilities"),
            (await outputs(*2 * [InferRequestedOutput("scores")]), "asked for already"),
            (await outputs(InferRequestedOutput("scores", class_count=11)), "is 11; 1 to 10"),
            (
                await outputs(InferRequestedOutput("probabilities", class_count=CLASSES + 1)),
                f"is {CLASSES + 1}; 1 to {CLASSES}",
            ),
            (await outputs(InferRequestedOutput("classes", class_count=1)), "scores or"),
            (await failure(client.infer("tiny", tensors, priority=10)), "is 10; 0 to 9 is"),
            (
                await failure(client.infer("tiny", tensors, timeout=-1)),
                "parameters[timeout]: is -1",
            ),
            (await failure(client.infer("tiny", tensors, sequence_id=7)), "sequences are not"),
            (await failure(client.infer("tiny", tensors, request_id=129 * "i")), "id: has 129"),
            (await failure(client.infer("", tensors)), "model: is empty"),
        ]
        for version in ("0", "-1", "newest", "1.0", "9" * 40, "١"):
            call = client.infer("tiny", tensors, model_version=version)
            cases.append((await failure(call), "a whole number from 1 is allowed"))
            cases.append((await failure(client.get_model_config("tiny", version)), "version: is"))
        for (code, message), words in cases:
            assert code == "INVALID_ARGUMENT", message
            assert words in message
        for call in (
            client.infer("other", tensors),
            client.infer("tiny", tensors, model_version="7"),
            client.get_model_metadata("other"),
            client.get_model_config("tiny", "7"),
            client.get_inference_statistics("other"),
        ):
            code, message = await failure(call)
            assert code == "NOT_FOUND"
            assert "tiny" in message
        answer = await client.infer("tiny", tensors, parameters={"trace": "mine"})
        assert answer.as_numpy("classes")[0, 0] == 1  # what nobody here knows is passed over


async def test_what_is_not_served_is_unimplemented(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as (served, _):
        for method in ("TraceSetting", "LogSettings", "CudaSharedMemoryStatus"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(served, method, pb.ServerLiveRequest())
            assert caught.value.code() == StatusCode.UNIMPLEMENTED
        request = pb.RepositoryIndexRequest(repository_name="mine")
        with pytest.raises(grpc.aio.AioRpcError, match="it has no name"):
            await ask(served, "RepositoryIndex", request)


async def test_a_failing_engine_is_an_internal_error(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with asking(tmp_path, load=loading(engines)) as (_, client):
        engines.made[0].failure = EngineFailure("secret")
        code, message = await failure(client.infer("tiny", image(rows(1))))
    assert code == "INTERNAL"
    assert "secret" not in message


# --- the wire --------------------------------------------------------------------------------


def test_the_wire_is_that_of_tritons_client() -> None:
    theirs = service_pb2.DESCRIPTOR.pool
    checked = 0
    waiting = [
        m for method in OPEN_INFERENCE.methods for m in (method.input_type, method.output_type)
    ]
    seen = set()
    while waiting:
        message = waiting.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        other = theirs.FindMessageTypeByName(message.full_name)
        for field in message.fields:
            known = other.fields_by_number[field.number]
            assert (known.name, known.type, known.is_repeated) == (
                field.name,
                field.type,
                field.is_repeated,
            ), field.full_name
            checked += 1
            if field.message_type is not None:
                waiting.append(field.message_type)
            if field.enum_type is not None:
                for value in field.enum_type.values:
                    assert known.enum_type.values_by_number[value.number].name == value.name
    assert checked > 80


def test_typed_pixels_are_read_whatever_their_values() -> None:
    values = np.random.default_rng(0).integers(0, 256, 5000)
    for numbers in (values, values[:1], np.zeros(200, int), np.full(127, 255), np.arange(256)):
        found = small_numbers(pb.InferTensorContents(uint_contents=numbers.tolist()), "contents")
        assert found.dtype == np.uint8
        assert found.tolist() == numbers.tolist()
    unknown = pb.InferTensorContents.FromString(b"\x22\x03\x05\xff\x01" + b"\x98\x06\x07")
    assert small_numbers(unknown, "contents").tolist() == [5, 255]
    for large in (256, 16_383, 16_384, (1 << 32) - 1):
        with pytest.raises(InvalidInput, match="above 255"):
            small_numbers(pb.InferTensorContents(uint_contents=[0, large, 5]), "contents")
