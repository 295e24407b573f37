"""REST returns the tensors that gRPC returns."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.images.input_spec import Pixels
from tests.api.http.rest_calls import client_of, encoded, image
from tests.api.v2.tensor_calls import png, rows
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
from tests.support.triton_clients import InferenceServerException

TOP_K = 10
INFER = "/v2/models/tiny/infer"


async def test_json_returns_what_grpc_returns(tmp_path: Path) -> None:
    publish(tmp_path)
    of = [5, 2, 9]
    pixels = rows(*of)
    async with client_of(tmp_path) as (served, client):
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


async def test_outputs_can_be_selected_and_returned_as_binary_data(tmp_path: Path) -> None:
    publish(tmp_path)
    outputs = [
        {"name": "scores", "parameters": {"classification": 2}},
        {"name": "classes", "parameters": {"binary_data": True}},
    ]
    async with client_of(tmp_path) as (_, client):
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


async def test_with_both_inputs_the_pixels_are_classified_in_json_and_in_binary(
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
                        parameters = answer.get_response()["parameters"]
                        assert parameters["passed_over"] == "encoded"

    async with serve(tmp_path, load=loading(Mirror)) as served:
        await asyncio.to_thread(tour, served.http.removeprefix("http://"))


async def test_tritons_client_gets_by_http_what_it_gets_by_grpc(tmp_path: Path) -> None:
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
        client_of(tmp_path) as (served, _),
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


async def test_null_means_absent(tmp_path: Path) -> None:
    """Clients that fill every field of a class send null for a field that is absent."""
    publish(tmp_path)
    plain = image(rows(3))
    (tensor,) = plain["inputs"]
    (file,) = encoded(png(4))["inputs"]
    absent = {"id": None, "parameters": None, "outputs": None}
    empty = {"parameters": {"priority": None, "timeout": None, "binary_data_output": None}}
    outputs = [{"name": "classes", "parameters": None}]
    size = {"parameters": {"binary_data_size": None, "shared_memory_region": None}}
    async with client_of(tmp_path) as (_, client):
        for request, first in (
            (plain | absent, 3),
            (plain | empty | {"outputs": outputs}, 3),
            ({"inputs": [tensor | {"parameters": None}]}, 3),
            ({"inputs": [tensor | size]}, 3),
            ({"inputs": [file | {"parameters": None}]}, 4),
            ({"inputs": [tensor, file | {"data": None}]}, 3),
        ):
            answer = await client.post(INFER, json=request)
            assert answer.status_code == 200, answer.text
            (classes, *_) = answer.json()["outputs"]
            assert classes["data"][0] == first
        pixels = rows(3).tobytes()
        text = json.dumps(
            {"inputs": [tensor | {"data": None, "parameters": {"binary_data_size": len(pixels)}}]}
        )
        headers = {"Inference-Header-Content-Length": str(len(text))}
        answer = await client.post(INFER, content=text.encode() + pixels, headers=headers)
        assert answer.json()["outputs"][0]["data"][0] == 3
        missing = await client.post(INFER, json={"inputs": [tensor | {"data": None}]})
        assert "is missing" in missing.json()["detail"]
        for body in ({"ready": None}, None):
            index = await client.post(
                "/v2/repository/index", json=body, headers={"content-type": "application/json"}
            )
            assert [one["name"] for one in index.json()] == ["tiny"]


@pytest.mark.parametrize("form", ["wrapped", "unpadded", "url-safe", "data URL"])
async def test_base64_is_read_in_every_usual_form(form: str, tmp_path: Path) -> None:
    publish(tmp_path)
    text = base64.b64encode(png(5)).decode()
    given = {
        "wrapped": base64.encodebytes(png(5)).decode(),
        "unpadded": text.rstrip("="),
        "url-safe": base64.urlsafe_b64encode(png(5)).decode(),
        "data URL": "data:image/png;base64," + text,
    }[form]
    for nested in (False, True):
        request = encoded(png(5), nested=nested)
        request["inputs"][0]["data"] = [[given]] if nested else [given]
        async with client_of(tmp_path) as (_, client):
            answer = await client.post(INFER, json=request)
            assert answer.json()["outputs"][0]["data"][0] == 5
