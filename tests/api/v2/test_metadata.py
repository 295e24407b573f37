"""Metadata, configuration, statistics and index are right, with the fields of Triton's client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.api.stubs import open_inference_pb2 as pb
from server.api.v2.metadata import EXTENSIONS
from tests.api.v2.tensor_calls import encoded, failure, image, png, rows, send, triton_client_of
from tests.support import triton_clients as triton
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SHAPE,
    Mirror,
    loading,
    publish,
    raw,
    serve,
)
from tests.support.triton_clients import (
    InferenceServerException,
    service_pb2,
)

OPEN_INFERENCE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
TOP_K = 10


async def test_tritons_blocking_client_can_call_every_method(tmp_path: Path) -> None:
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


async def test_metadata_and_config_describe_the_tensors(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (_, client):
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
    assert config.max_batch_size == 256, "the limit of a request, not of a batch"
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
    async with triton_client_of(tmp_path) as (served, client):
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


async def test_the_index_lists_every_version_and_which_ones_are_ready(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (served, client):
        index = (await client.get_model_repository_index()).models
        only_ready = service_pb2.RepositoryIndexRequest(ready=True)
        answer = await send(served, "RepositoryIndex", only_ready)
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


def test_messages_have_the_fields_of_tritons_client() -> None:
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
