"""An image file sent as a body is classified as Classify does."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.api.stubs import classify_pb2
from tests.api.http.rest_calls import client_of, counted
from tests.api.v2.tensor_calls import png
from tests.support.serving import (
    publish,
)

CLASSIFY = "/v1/models/tiny:classify"


async def test_an_image_as_body_is_classified_as_classify_does(tmp_path: Path) -> None:
    publish(tmp_path)
    request = classify_pb2.ClassifyRequest(
        model="tiny", images=[classify_pb2.Image(encoded=png(7))], top_k=3
    )
    async with client_of(tmp_path) as (served, client):
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
        by_default = (await client.post(CLASSIFY, content=png(7))).json()
        assert len(by_default["classes"]) == 5
        assert counted(served, "Classify", "OK") == 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
async def test_curl_classifies_a_file(tmp_path: Path) -> None:
    publish(tmp_path)
    file = tmp_path / "cat.png"
    file.write_bytes(png(4))
    async with client_of(tmp_path) as (served, _):

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
        form = await curl("-F", f"image=@{file}", address + "?top_k=1")
        assert [c["label"] for c in form["classes"]] == ["class 4"]
