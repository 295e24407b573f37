"""Errors by HTTP are problems that name the field."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from server.errors import EngineFailure
from tests.api.http.rest_calls import client_of, counted, encoded, image, problem
from tests.api.v2.tensor_calls import png, rows
from tests.support.serving import (
    SHAPE,
    Mirrors,
    loading,
    publish,
)

CLASSIFY = "/v1/models/tiny:classify"
INFER = "/v2/models/tiny/infer"


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
        ("/v1/models/other:classify", png(1), 404, "", "no model 'other'; known models: tiny"),
        ("/v1/models/tiny/versions/9:classify", png(1), 404, "", "has no version 9; it has 2, 1"),
        ("/v1/models/tiny/versions/1:classify", png(1), 503, "", "version 1 is unavailable"),
        ("/v2/models/other/infer", json.dumps(one).encode(), 404, "", "known models: tiny"),
        ("/v2/models/other/infer", b'{"inputs": []}', 404, "", "known models: tiny"),
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
            wrong(name="encoded", datatype="BYTES", shape=[1], data=["a?b="]),
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
    async with client_of(tmp_path) as (_, client):
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
        assert (await client.post(INFER, json=one)).status_code == 200  # nothing is left behind


async def test_a_failing_engine_is_an_internal_error_without_details(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors()
    async with client_of(tmp_path, load=loading(engines)) as (served, client):
        engines.made[0].failure = EngineFailure("secret")
        response = await client.post(CLASSIFY, content=png(1))
        assert (response.status_code, problem(response)["code"]) == (500, "INTERNAL")
        assert "secret" not in response.text
        assert counted(served, "Classify", "INTERNAL") == 1


async def test_an_overloaded_server_sends_a_time_to_retry(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with client_of(tmp_path, load=loading(engines), max_calls=1) as (served, client):
        first = asyncio.create_task(client.post(CLASSIFY, content=png(1)))
        await engines.made[0].started.wait()
        response = await client.post(CLASSIFY, content=png(2))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        found = problem(response)
        assert (found["code"], found["retry_after_ms"]) == ("RESOURCE_EXHAUSTED", 100)
        assert (await client.get("/v2/health/live")).status_code == 200  # probes have no limit
        engines.made[0].release()
        assert (await first).status_code == 200
        assert (await client.post(CLASSIFY, content=png(2))).status_code == 200
        assert counted(served, "Classify", "RESOURCE_EXHAUSTED") == 1


async def test_mutated_requests_are_client_errors_and_harm_no_other(tmp_path: Path) -> None:
    publish(tmp_path)
    rng = random.Random(20260101)
    valid = json.dumps(image(rows(1), outputs=[{"name": "classes"}], id="i")).encode()
    statuses = set()
    async with client_of(tmp_path) as (_, client):
        for turn in range(400):
            body = bytearray(valid)
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
        answer = await client.post(INFER, content=valid)
        assert answer.json()["outputs"][0]["data"][0] == 1
