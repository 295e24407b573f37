"""Wrong tensors, outputs and parameters are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from server.api.stubs import open_inference_pb2 as pb
from tests.api.v2.tensor_calls import (
    failure,
    image,
    infer,
    png,
    raw_bytes,
    refused,
    rows,
    send,
    triton_client_of,
    typed,
)
from tests.support.serving import (
    CLASSES,
    SHAPE,
    publish,
)
from tests.support.triton_clients import (
    InferRequestedOutput,
)


async def test_wrong_tensors_are_refused_by_name_with_what_is_allowed(tmp_path: Path) -> None:
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
        (raw_bytes(data, [-1, *SHAPE]), "inputs[0].shape[0]: is -1; a request may have 1 to 256"),
        (raw_bytes(b"", [0, *SHAPE]), "inputs[0].shape[0]: is 0; a request may have 1 to 256"),
        (raw_bytes(data, [1 << 62, *SHAPE]), "a request may have 1 to 256"),
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
    async with triton_client_of(tmp_path) as (served, _):
        for request, words in cases:
            assert words in await refused(served, request)
        assert await infer(served, raw_bytes(data, shape))  # nothing is left behind
        bare = typed(1)
        bare.inputs.add(name="encoded", datatype="BYTES", shape=[1])
        assert await infer(served, bare)  # an ignored input needs no data


async def test_wrong_outputs_parameters_and_names_are_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    tensors = image(rows(1))
    async with triton_client_of(tmp_path) as (_, client):

        async def outputs(*wanted: Any) -> tuple[str, str]:
            return await failure(client.infer("tiny", tensors, outputs=list(wanted)))

        cases = [
            (await outputs(InferRequestedOutput("logits")), "classes, scores, probabilities"),
            (await outputs(*2 * [InferRequestedOutput("scores")]), "requested already"),
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
        assert answer.as_numpy("classes")[0, 0] == 1  # unknown parameters are ignored


async def test_methods_that_are_not_served_are_unimplemented(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (served, _):
        for method in ("TraceSetting", "LogSettings", "CudaSharedMemoryStatus"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(served, method, pb.ServerLiveRequest())
            assert caught.value.code() == StatusCode.UNIMPLEMENTED
        request = pb.RepositoryIndexRequest(repository_name="mine")
        with pytest.raises(grpc.aio.AioRpcError, match="it has no name"):
            await send(served, "RepositoryIndex", request)
