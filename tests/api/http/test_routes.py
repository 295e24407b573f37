"""Over HTTP the same calls get the same answers, the same refusals, and are counted alike."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import shutil
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.http import app as http
from server.api.http import body
from server.api.status import HTTP_STATUS, STATUS
from server.api.stubs import classify_pb2
from server.api.v2 import json_tensors
from server.errors import EngineFailure
from server.images.input_spec import Pixels
from tests.api.v2.test_service import png, rows
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
from tests.support.triton_clients import InferenceServerException

TOP_K = 10
CLASSIFY = "/v1/models/tiny:classify"
INFER = "/v2/models/tiny/infer"


@asynccontextmanager
async def asking(repo: Path, **options: Any) -> AsyncIterator[tuple[Served, httpx.AsyncClient]]:
    """A server of Mirrors, and a client of its HTTP port."""
    usual: dict[str, Any] = {"load": loading(Mirror)}
    async with (
        serve(repo, **usual | options) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        yield served, client


def image(pixels: Pixels, data: Any = None, **fields: Any) -> dict[str, Any]:
    """The JSON of a call with those pixels."""
    numbers = pixels.reshape(-1).tolist() if data is None else data
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": numbers}
    return {"inputs": [tensor], **fields}


def encoded(*files: bytes, nested: bool = False) -> dict[str, Any]:
    texts: list[Any] = [base64.b64encode(file).decode() for file in files]
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [len(files)], "data": texts}
    if nested:
        tensor |= {"shape": [len(files), 1], "data": [[text] for text in texts]}
    return {"inputs": [tensor]}


def counted(served: Served, method: str, code: str) -> float:
    """Calls of that method that ended so, whatever the model."""
    return sum(
        sample.value
        for family in served.server.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "convserve_requests_total"
        and (sample.labels["method"], sample.labels["code"]) == (method, code)
    )


async def until_counted(served: Served, method: str, code: str) -> None:
    while not counted(served, method, code):
        await asyncio.sleep(0.001)


def problem(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert found["status"] == response.status_code
    assert found["error"] == found["detail"]
    return found


# --- an image ---------------------------------------------------------------------------------


async def test_an_image_body_is_classified_as_classify_does(tmp_path: Path) -> None:
    publish(tmp_path)
    request = classify_pb2.ClassifyRequest(
        model="tiny", images=[classify_pb2.Image(encoded=png(7))], top_k=3
    )
    async with asking(tmp_path) as (served, client):
        expected = await served.classify(request)
        for path in (CLASSIFY, "/v1/models/tiny/versions/1:classify"):
            query: dict[str, str | int] = {"top_k": 3, "request_id": "mine", "priority": 9}
            response = await client.post(path, content=png(7), params=query)
            assert response.status_code == 200
            answer = response.json()
            assert answer["classes"] == [
                {"index": c.index, "label": c.label, "probability": c.probability}
                for c in expected.results[0].classes
            ]
            assert (answer["model"], answer["version"], answer["trained"]) == ("tiny", 1, False)
            assert answer["request_id"] == "mine"
            timing = answer["timing"]
            assert timing["batch_rows"] == [1]
            phases = timing["decode_ms"] + timing["queue_ms"] + timing["compute_ms"]
            assert 0 < phases <= timing["total_ms"]
        usual = (await client.post(CLASSIFY, content=png(7))).json()
        assert len(usual["classes"]) == 5
        assert counted(served, "Classify", "OK") == 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
async def test_curl_classifies_a_file(tmp_path: Path) -> None:
    publish(tmp_path)
    file = tmp_path / "cat.png"
    file.write_bytes(png(4))
    async with asking(tmp_path) as (served, _):

        async def curl(*arguments: str) -> Any:
            command = ("curl", "--silent", "--show-error", "--max-time", "20", *arguments)
            child = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, err = await child.communicate()
            assert child.returncode == 0, err
            return json.loads(out)

        address = served.http + CLASSIFY
        for way in ("--data-binary", "--upload-file"):
            what = f"@{file}" if way == "--data-binary" else str(file)
            answer = await curl("-X", "POST", way, what, address + "?top_k=1")
            assert [c["label"] for c in answer["classes"]] == ["class 4"]
        chunked = ("-H", "Transfer-Encoding: chunked", "--data-binary", f"@{file}")
        assert (await curl(*chunked, address))["classes"][0]["index"] == 4
        form = await curl("-F", f"image=@{file}", address)
        assert "--data-binary" in form["detail"]


# --- tensors ----------------------------------------------------------------------------------


async def test_json_gives_what_grpc_gives(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [5, 2, 9]
    pixels = rows(*of)
    async with asking(tmp_path) as (served, client):
        classified = await served.classify(raw(*of, top_k=TOP_K))
        ways: list[Any] = [
            image(pixels),
            image(pixels, pixels.tolist()),
            encoded(*map(png, of)),
            encoded(*map(png, of), nested=True),
        ]
        for call in ways:
            response = await client.post(INFER, json={"id": "mine", **call})
            assert response.headers["content-type"] == "application/json"
            answer = response.json()
            assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
            assert (answer["id"], answer["parameters"]) == ("mine", {"trained": False})
            assert [(o["name"], o["datatype"], o["shape"]) for o in answer["outputs"]] == [
                ("classes", "INT32", [3, TOP_K]),
                ("scores", "FP32", [3, TOP_K]),
                ("probabilities", "FP32", [3, CLASSES]),
            ]
            classes, scores, probabilities = (o["data"] for o in answer["outputs"])
            flat = [c for result in classified.results for c in result.classes]
            assert classes == [c.index for c in flat]
            assert scores == [c.probability for c in flat]
            assert [probabilities[CLASSES * row + first] for row, first in enumerate(of)] == [
                *(0.5, 0.5, 0.5)
            ]
        indented = json.dumps(image(pixels, pixels.tolist()), indent=1)
        assert (await client.post(INFER, content=indented)).json()["outputs"][0]["data"] == classes


async def test_outputs_are_chosen_and_come_as_bytes_where_asked(tmp_path: Path) -> None:
    publish(tmp_path)
    outputs = [
        {"name": "scores", "parameters": {"classification": 2}},
        {"name": "classes", "parameters": {"binary_data": True}},
    ]
    async with asking(tmp_path) as (_, client):
        response = await client.post(INFER, json=image(rows(3, 4), outputs=outputs))
        size = int(response.headers["Inference-Header-Content-Length"])
        assert response.headers["content-type"] == "application/octet-stream"
        texts, classes = json.loads(response.content[:size])["outputs"]
        assert texts["data"][::2] == ["0.500000:3:class 3", "0.500000:4:class 4"]
        assert (texts["datatype"], texts["shape"]) == ("BYTES", [2, 2])
        assert classes["parameters"] == {"binary_data_size": 2 * TOP_K * 4}
        found = np.frombuffer(response.content[size:], "<i4").reshape(2, TOP_K)
        assert found[:, 0].tolist() == [3, 4]
        every = image(rows(3), parameters={"binary_data_output": True})
        response = await client.post(INFER, json=every)
        size = int(response.headers["Inference-Header-Content-Length"])
        assert len(response.content) == size + 4 * (2 * TOP_K + CLASSES)


async def test_of_both_inputs_the_pixels_are_classified_wherever_their_bytes_stand(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    http = triton.http
    pixels, text = (
        http.InferInput("image", [2, *SHAPE], "UINT8"),
        http.InferInput("encoded", [2, 1], "BYTES"),
    )

    def tour(target: str) -> None:
        with http.InferenceServerClient(target, network_timeout=20) as client:
            for pixels_binary in (True, False):
                for text_binary in (True, False):
                    pixels.set_data_from_numpy(rows(6, 1), binary_data=pixels_binary)
                    strings = np.array([[b"no file"], [b"none"]], dtype=object)
                    text.set_data_from_numpy(strings, binary_data=text_binary)
                    for both in ([pixels, text], [text, pixels]):
                        answer = client.infer("tiny", both)
                        assert answer.as_numpy("classes")[:, 0].tolist() == [6, 1]
                        told = answer.get_response()["parameters"]
                        assert told["passed_over"] == "encoded"

    async with serve(tmp_path, load=loading(Mirror)) as served:
        await asyncio.to_thread(tour, served.http.removeprefix("http://"))


async def test_tritons_client_gets_over_http_what_it_gets_over_grpc(tmp_path: Path) -> None:
    publish(tmp_path)
    http = triton.http

    def tensor(pixels: Pixels, binary: bool) -> Any:
        made = http.InferInput("image", pixels.shape, "UINT8")
        made.set_data_from_numpy(pixels, binary_data=binary)
        return [made]

    def tour(target: str) -> None:
        with http.InferenceServerClient(target, network_timeout=20) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("tiny")
            assert client.is_model_ready("tiny", "1")
            assert not client.is_model_ready("tiny", "2")
            assert not client.is_model_ready("other")
            assert client.get_server_metadata()["name"] == "convserve"
            assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
            metadata = client.get_model_metadata("tiny", "1")
            assert metadata["inputs"][0]["shape"] == [-1, *SHAPE]
            config = client.get_model_config("tiny")
            assert config["max_batch_size"] == 256
            assert config["parameters"]["engine_max_batch"] == {"string_value": str(MAX_BATCH)}
            assert config["input"][0]["data_type"] == "TYPE_UINT8"
            index = client.get_model_repository_index()
            assert [(m["name"], m["state"]) for m in index] == [("tiny", "READY")]
            for binary in (True, False):
                answer = client.infer("tiny", tensor(rows(6, 1), binary), request_id="mine")
                assert answer.as_numpy("classes")[:, 0].tolist() == [6, 1]
                assert answer.as_numpy("probabilities").shape == (2, CLASSES)
                assert answer.get_response()["id"] == "mine"
            wanted = [
                http.InferRequestedOutput("scores", binary_data=False),
                http.InferRequestedOutput("probabilities", class_count=2),
            ]
            answer = client.infer("tiny", tensor(rows(6), True), outputs=wanted, priority=1)
            assert answer.as_numpy("scores")[0, 0] == 0.5
            assert answer.as_numpy("probabilities")[0, 0] == b"0.500000:6:class 6"
            files = http.InferInput("encoded", [1], "BYTES")
            files.set_data_from_numpy(np.array([png(8)], dtype=object))
            assert client.infer("tiny", [files]).as_numpy("classes")[0, 0] == 8
            later = client.async_infer("tiny", tensor(rows(2), True))
            assert later.get_result(timeout=20).as_numpy("classes")[0, 0] == 2
            stats = client.get_inference_statistics("tiny")["model_stats"][0]
            assert stats["inference_count"] == 7
            assert stats["inference_stats"]["success"]["count"] == 5
            assert client.get_inference_statistics()["model_stats"] == [stats]
            with pytest.raises(InferenceServerException) as caught:
                client.infer("tiny", tensor(rows(1)[:, :4], True))
            assert caught.value.status() == "400"
            assert "'image' is [1, 4, 6, 3]; [images, 8, 6, 3]" in caught.value.message()

    async with (
        asking(tmp_path) as (served, _),
        triton.http_aio.InferenceServerClient(served.http.removeprefix("http://")) as client,
    ):
        await asyncio.to_thread(tour, served.http.removeprefix("http://"))
        answer = await client.infer("tiny", tensor(rows(9), True))
        assert answer.as_numpy("classes")[0, 0] == 9
        for encoding in ("gzip", "deflate"):
            for binary in (False, True):
                given = tensor(rows(9), binary)
                answer = await client.infer("tiny", given, request_compression_algorithm=encoding)
                assert answer.as_numpy("classes")[0, 0] == 9


async def test_numbers_are_read_wherever_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for chunk in (1, 2, 3, 4, 5, 7, 64, 1 << 20):
        monkeypatch.setattr(json_tensors, "CHUNK_BYTES", chunk)
        for shape in ((1, 1, 1, 1), (2, 4, 3, 3)):
            values = rng.integers(0, 256, shape, dtype=np.uint8)
            for data in (values.tolist(), values.reshape(-1).tolist()):
                for text in (json.dumps(data), json.dumps(data, indent=1)):
                    found = json_tensors.numbers_from_json(text.encode(), shape, "data")
                    assert (found == values).all()


# --- what is refused --------------------------------------------------------------------------


def test_every_status_has_one_of_http() -> None:
    assert HTTP_STATUS.keys() == set(STATUS.values())


async def test_errors_are_problems_that_name_the_field(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    one = image(rows(1))

    def wrong(**fields: Any) -> bytes:
        return json.dumps({"inputs": [one["inputs"][0] | fields]}).encode()

    pixels = rows(1).reshape(-1).tolist()
    behind = encoded(b"")["inputs"][0] | {"parameters": {"binary_data_size": 5}}
    del behind["data"]
    without_data = {name: value for name, value in one["inputs"][0].items() if name != "data"}
    calls: list[tuple[str, bytes, int, str, str]] = [
        (CLASSIFY, b"", 400, "body", "is empty; a JPEG, PNG"),
        (CLASSIFY, b"no image", 400, "body", "not a supported format"),
        (CLASSIFY + "?top_k=11", png(1), 400, "top_k", "is 11; this model gives 1 to 10"),
        (CLASSIFY + "?top_k=-1", png(1), 400, "top_k", "is '-1'; a whole number is needed"),
        (CLASSIFY + "?top=1", png(1), 400, "top", "is not a parameter; top_k"),
        (CLASSIFY + "?priority=10", png(1), 400, "priority", "is 10; 0 (the default) to 9"),
        (CLASSIFY + f"?request_id={129 * 'i'}", png(1), 400, "request_id", "has 129 characters"),
        ("/v1/models/tiny/versions/new:classify", png(1), 400, "version", "is 'new'; a whole"),
        ("/v1/models/other:classify", png(1), 404, "", "there is no model 'other'; there are tiny"),
        ("/v1/models/tiny/versions/9:classify", png(1), 404, "", "has no version 9; it has 2, 1"),
        ("/v1/models/tiny/versions/1:classify", png(1), 503, "", "version 1 is unavailable"),
        ("/v2/models/other/infer", json.dumps(one).encode(), 404, "", "there are tiny"),
        ("/v2/models/other/infer", b'{"inputs": []}', 404, "", "there are tiny"),
        (
            INFER,
            wrong(name="encoded", datatype="BYTES", shape=[1], data=["a"]).replace(
                b'"a"', b'"\xff"'
            ),
            *(400, "inputs[0].data", "must be an array of files"),
        ),
        (INFER, b"", 400, "body", "truncated"),
        (INFER, b"{}", 400, "body", "missing required field `inputs`"),
        (INFER, b'{"inputs": [3]}', 400, "inputs[0]", "Expected `object`, got `int`"),
        (INFER, b'{"inputs": ["\xff"]}', 400, "inputs[0]", "Expected `object`, got `str`"),
        (INFER, 9999 * b"[", 400, "body", "Expected `object`, got `array`"),
        (INFER, b'{"x":' + 9999 * b"[", 400, "body", "nested too deep"),
        (INFER, b'{"inputs": []}', 400, "inputs", "has 0 tensors; one is needed"),
        (INFER, b'{"inputs": [' + 9999 * b"{}," + b"{}]}", 400, "body", "has more than"),
        (INFER, wrong(name="\ud800"), 400, "body", ""),
        (INFER, wrong(name="pixels"), 400, "inputs[0].name", "is 'pixels'; image or encoded"),
        (INFER, wrong(shape="1"), 400, "inputs[0].shape", "array of a few whole numbers"),
        (INFER, wrong(shape=[1 << 70]), 400, "inputs[0].shape", "array of a few whole numbers"),
        (INFER, wrong(shape=999 * [1]), 400, "inputs[0].shape", "array of a few whole numbers"),
        (INFER, wrong(shape=[2, *SHAPE]), 400, "inputs[0].data", "has 144 numbers; shape [2, 8"),
        (INFER, wrong(data=[pixels, []]), 400, "inputs[0].data", "is neither flat nor nested"),
        (INFER, wrong(data=[*pixels[1:], 256]), 400, "inputs[0].data", "has a number above 255"),
        (INFER, wrong(data=[*pixels[1:], 1000]), 400, "inputs[0].data", "has a number above 255"),
        (INFER, wrong(data=[*pixels[1:], 1.5]), 400, "inputs[0].data", "contains '.'"),
        (INFER, wrong(data=[*pixels[1:], -1]), 400, "inputs[0].data", "contains '-'"),
        (INFER, wrong(data=[*pixels[1:], "1"]), 400, "inputs[0].data", "whole numbers are needed"),
        (INFER, wrong(data=7), 400, "inputs[0].data", "has 0 numbers"),
        (
            INFER,
            json.dumps({"inputs": [without_data]}).encode(),
            *(400, "inputs[0].data", "of 'image' is missing"),
        ),
        (INFER, json.dumps(encoded(b"no image")).encode(), 400, "inputs[0].data[0]", "the file of"),
        (
            INFER,
            wrong(name="encoded", datatype="BYTES", shape=[1], data=["a-b="]),
            *(400, "inputs[0].data[0]", "is not base64"),
        ),
        (
            INFER,
            wrong(name="encoded", datatype="BYTES", shape=[2], data=["aaaa"]),
            *(400, "inputs[0].data", "has 1 elements"),
        ),
        (
            INFER,
            wrong(name="encoded", datatype="BYTES", shape=[1], data=[1]),
            *(400, "inputs[0].data", "must be an array of files"),
        ),
        (
            INFER,
            wrong(name="encoded", datatype="BYTES", shape=[1], data=[["aaaa"]]),
            *(400, "inputs[0].data", "must be an array of files"),
        ),
        (
            INFER,
            json.dumps({"inputs": [one["inputs"][0], behind]}).encode(),
            *(400, "inputs[1].parameters[binary_data_size]", "is 5; 0 bytes follow"),
        ),
        (
            INFER,
            wrong(parameters={"binary_data_size": 144}),
            *(400, "inputs[0].parameters[binary_data_size]", "and data too"),
        ),
        (
            INFER,
            wrong(parameters={"mine": 1 << 64}),
            *(400, "inputs[0].parameters[mine]", "more than 64 bits"),
        ),
        (
            INFER,
            json.dumps(image(rows(1), parameters={"timeout": "1"})).encode(),
            *(400, "parameters[timeout]", "must be a whole number"),
        ),
        (
            INFER,
            json.dumps(image(rows(1), parameters={"binary_data_output": 1})).encode(),
            *(400, "parameters[binary_data_output]", "must be true or false"),
        ),
    ]
    async with asking(tmp_path) as (_, client):
        for path, body, status, field, words in calls:
            response = await client.post(path, content=body)
            found = problem(response)
            assert (response.status_code, found.get("field", "")) == (status, field), found
            assert words in found["detail"], found
        for headers, field in (
            ({"Inference-Header-Content-Length": "100000"}, "Inference-Header-Content-Length"),
            ({"Inference-Header-Content-Length": "x"}, "Inference-Header-Content-Length"),
            ({"Grpc-Timeout": "5"}, "Grpc-Timeout"),
        ):
            response = await client.post(INFER, json=one, headers=headers)
            assert (response.status_code, problem(response)["field"]) == (400, field)
        header = json.dumps({"inputs": [one["inputs"][0] | {"data": None}]}).encode()
        sizes = {"Inference-Header-Content-Length": str(len(header))}
        response = await client.post(INFER, content=header + b"pixels", headers=sizes)
        assert problem(response)["detail"].endswith("6 bytes follow the JSON")
        for path, status in (("/v2/models/other", 404), ("/v2/nothing", 404), (INFER, 405)):
            response = await client.get(path)
            assert response.status_code == problem(response)["status"] == status
        unready = await client.get("/v2/models/tiny/versions/1/ready")
        assert (unready.status_code, unready.json()) == (503, {"name": "tiny", "ready": False})
        assert (await client.post(INFER, json=one)).status_code == 200  # and nothing is left behind


async def test_a_failing_engine_is_an_internal_error_without_details(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with asking(tmp_path, load=loading(engines)) as (served, client):
        engines.made[0].failure = EngineFailure("secret")
        response = await client.post(CLASSIFY, content=png(1))
        assert (response.status_code, problem(response)["code"]) == (500, "INTERNAL")
        assert "secret" not in response.text
        assert counted(served, "Classify", "INTERNAL") == 1


async def test_a_large_body_is_refused_before_it_is_read(tmp_path: Path) -> None:
    publish(tmp_path)
    limits = {"max_image_bytes": 1000, "max_message_bytes": 5000, "max_bytes_in_progress": 5000}
    async with asking(tmp_path, **limits) as (served, client):
        for path, limit in ((CLASSIFY, 1000), (INFER, 5000)):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
            head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {limit + 1}\r\n"
            writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
            writer.close()
            await writer.wait_closed()

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(10):
                    yield 600 * b"x"

            response = await client.post(path, content=chunks())  # its length is not told
            assert (response.status_code, problem(response)["status"]) == (413, 413)
            assert f"more than {limit:,} bytes" in response.text
        answer = await client.post(INFER, json=image(rows(1)))  # all of it has been given back
        assert answer.status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    monkeypatch.setattr(body, "MAX_BODY_S", 0.05)
    async with asking(tmp_path) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(
            f"POST {CLASSIFY} HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert await reader.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_is_on_its_way_when_the_server_ends_is_waited_for(tmp_path: Path) -> None:
    publish(tmp_path)
    picture = png(3)
    async with asking(tmp_path, grace_s=20.0) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        lines = f"Host: here\r\nExpect: 100-continue\r\nContent-Length: {len(picture)}\r\n\r\n"
        writer.write(f"POST {CLASSIFY} HTTP/1.1\r\n{lines}".encode())
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n", "it is waited for"
        assert await reader.readline() == b"\r\n"
        writer.write(picture[:9])

        async def rest_of_it() -> bytes:
            while served.server.accepting:
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)  # the server has begun to end
            writer.write(picture[9:])
            return await reader.read()

        coming = asyncio.create_task(rest_of_it())
    assert (await coming).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_body_that_does_not_come_before_the_server_ends_is_told_so(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path, grace_s=0.1) as (served, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        lines = "Host: here\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        writer.write(f"POST {CLASSIFY} HTTP/1.1\r\n{lines}".encode())
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert await reader.readline() == b"\r\n"
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"the server has stopped" in answer
    writer.close()


async def test_what_is_too_much_is_told_when_to_come_again(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with asking(tmp_path, load=loading(engines), max_calls=1) as (served, client):
        first = asyncio.create_task(client.post(CLASSIFY, content=png(1)))
        await engines.made[0].started.wait()
        response = await client.post(CLASSIFY, content=png(2))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        found = problem(response)
        assert (found["code"], found["retry_after_ms"]) == ("RESOURCE_EXHAUSTED", 100)
        assert (await client.get("/v2/health/live")).status_code == 200  # who asks is told anyway
        engines.made[0].release()
        assert (await first).status_code == 200
        assert (await client.post(CLASSIFY, content=png(2))).status_code == 200
        assert counted(served, "Classify", "RESOURCE_EXHAUSTED") == 1


# --- time -------------------------------------------------------------------------------------


async def test_the_header_and_the_parameter_set_a_deadline(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with asking(tmp_path, load=loading(engines)) as (served, client):
        soon = {"Grpc-Timeout": "1u"}
        unreachable = await client.post(CLASSIFY, content=png(1), headers=soon)
        assert (unreachable.status_code, problem(unreachable)["code"]) == (504, "DEADLINE_EXCEEDED")
        parameter = image(rows(1), parameters={"timeout": 1})
        assert (await client.post(INFER, json=parameter)).status_code == 504
        passed = await client.post(CLASSIFY, content=png(1), headers={"Grpc-Timeout": "500m"})
        assert (passed.status_code, problem(passed)["detail"]) == (504, "the deadline has passed")
        metrics = served.server.metrics.registry
        missed = {"model": "tiny", "stage": "compute"}
        assert metrics.get_sample_value("convserve_deadline_missed_total", missed) == 1
        assert counted(served, "Classify", "DEADLINE_EXCEEDED") == 2
        engines.made[0].release()
        late = await client.post(CLASSIFY, content=png(1), headers={"Grpc-Timeout": "20S"})
        assert late.status_code == 200


async def test_a_caller_that_hangs_up_costs_no_compute(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with asking(tmp_path, load=loading(engines)) as (served, client):
        (ready,) = served.server.registry.serving_models()
        first = asyncio.create_task(client.post(CLASSIFY, content=png(1)))
        await engines.made[0].started.wait()
        _, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        file = png(5)
        head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(file)}\r\n\r\n"
        writer.write(head.encode() + file)
        while not ready.executor.queued_rows("tiny/1"):
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        await until_counted(served, "Classify", "CANCELLED")
        assert ready.executor.queued_rows("tiny/1") == 0
        engines.made[0].release()
        assert (await first).status_code == 200
        assert (await client.post(CLASSIFY, content=png(7))).status_code == 200
    assert engines.made[0].batches == [1, 7]


async def test_a_stopping_server_answers_what_it_took_and_takes_no_more(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    taken: asyncio.Task[httpx.Response]
    async with httpx.AsyncClient(timeout=20) as client:
        async with serve(tmp_path, load=loading(engines), grace_s=60) as served:
            taken = asyncio.create_task(client.post(served.http + CLASSIFY, content=png(1)))
            await engines.made[0].started.wait()
            http, server = served.http, served.server

            async def ask_late() -> httpx.Response:
                while server.accepting:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0)
                response = await client.post(http + CLASSIFY, content=png(2))
                engines.made[0].release()
                return response

            late = asyncio.create_task(ask_late())
        assert (await taken).json()["classes"][0]["index"] == 1
        assert (await late).status_code == 503
        assert problem(await late)["code"] == "UNAVAILABLE"


# --- whatever comes ---------------------------------------------------------------------------


async def test_mangled_requests_are_the_callers_mistake_and_harm_nobody(tmp_path: Path) -> None:
    publish(tmp_path)
    rng = random.Random(20260101)
    sound = json.dumps(image(rows(1), outputs=[{"name": "classes"}], id="i")).encode()
    statuses = set()
    async with asking(tmp_path) as (_, client):
        for turn in range(400):
            body = bytearray(sound)
            for _ in range(rng.randint(1, 4)):
                begin = rng.randrange(len(body))
                part = rng.choice(
                    [b"", b'"', b"{", b"[", b"]", b",", b"\xff", b"-1", b"1e9", b"\0"]
                )
                body[begin : begin + rng.choice([0, 1, 1, 40])] = part
            headers = {}
            if turn % 3 == 0:
                headers["Inference-Header-Content-Length"] = str(rng.randint(0, len(body)))
            response = await client.post(INFER, content=bytes(body), headers=headers)
            assert response.status_code in (200, 400, 404), response.text
            statuses.add(response.status_code)
        assert statuses == {200, 400}
        answer = await client.post(INFER, content=sound)
        assert answer.json()["outputs"][0]["data"][0] == 1


async def test_compressed_bodies_are_read_as_far_as_is_allowed(tmp_path: Path) -> None:
    publish(tmp_path)
    picture = png(3)
    async with asking(tmp_path, max_image_bytes=10_000) as (_, client):

        async def post(body: bytes, encoding: str) -> httpx.Response:
            return await client.post(CLASSIFY, content=body, headers={"content-encoding": encoding})

        for encoding in ("gzip", "GZIP", "Identity"):
            body = picture if encoding == "Identity" else gzip.compress(picture)
            assert (await post(body, encoding)).json()["classes"][0]["index"] == 3
        for body, encoding, status, words in (
            (
                gzip.compress(bytes(1 << 20)),
                "gzip",
                413,
                "more than 10,000 bytes when decompressed",
            ),
            (picture, "gzip", 400, "is not valid gzip"),
            (gzip.compress(picture)[:-1], "gzip", 400, "its gzip ends too early"),
            (gzip.compress(picture), "br", 415, "'br'; identity, gzip, deflate are understood"),
            (zlib.compress(picture) + b"more", "deflate", 400, "continues after its end"),
        ):
            refused = await post(body, encoding)
            assert refused.status_code == status
            assert words in problem(refused)["detail"]
        assert (await post(gzip.compress(picture), "gzip")).status_code == 200


async def test_who_asks_whether_to_go_on_and_may_not_is_let_go(tmp_path: Path) -> None:
    """The body may come or not: what came next would be taken for a part of it."""
    publish(tmp_path)
    head = f"POST {CLASSIFY} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
    async with asking(tmp_path) as (served, _):
        for line, status in (("content-length: 99999999", 413), ("content-encoding: br", 415)):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
            length = "" if "length" in line else "content-length: 9\r\n"
            writer.write(f"{head}{line}\r\n{length}\r\n".encode())
            answer = (await reader.read()).decode()
            assert answer.startswith(f"HTTP/1.1 {status} ")
            assert "connection: close" in answer.lower()
            writer.close()
            await writer.wait_closed()


ONE = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", ONE[:-4], ONE + ONE[:9], b"\r\n"])
async def test_who_is_silent_or_stops_within_a_head_is_let_go(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.2)
    publish(tmp_path)
    async with serve(tmp_path) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.count(b"200 OK") == sent.count(ONE)


async def test_a_request_under_way_is_not_taken_for_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.05)
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with (
        serve(tmp_path, load=loading(engines)) as served,
        httpx.AsyncClient(base_url=served.http, timeout=20) as client,
    ):
        call = asyncio.create_task(client.post("/v1/models/tiny:classify", content=png(3)))
        await engines.made[0].started.wait()
        await asyncio.sleep(0.1)  # twice what silence may last
        engines.made[0].release()
        assert (await call).status_code == 200
