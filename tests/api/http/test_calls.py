"""Calls by HTTP have deadlines, can be cancelled, and are drained."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from tests.api.http.rest_calls import client_of, counted, image, problem, until_counted
from tests.api.v2.tensor_calls import png, rows
from tests.support.serving import (
    Mirrors,
    loading,
    publish,
    serve,
)

CLASSIFY = "/v1/models/tiny:classify"
INFER = "/v2/models/tiny/infer"


async def test_the_header_and_the_parameter_set_a_deadline(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with client_of(tmp_path, load=loading(engines)) as (served, client):
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


async def test_a_disconnected_client_never_reaches_the_engine(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with client_of(tmp_path, load=loading(engines)) as (served, client):
        (model,) = served.server.registry.serving_models()
        first = asyncio.create_task(client.post(CLASSIFY, content=png(1)))
        await engines.made[0].started.wait()
        _, writer = await asyncio.open_connection("127.0.0.1", served.server.http_port)
        file = png(5)
        head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(file)}\r\n\r\n"
        writer.write(head.encode() + file)
        while not model.executor.queued_rows("tiny/1"):
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        await until_counted(served, "Classify", "CANCELLED")
        assert model.executor.queued_rows("tiny/1") == 0
        engines.made[0].release()
        assert (await first).status_code == 200
        assert (await client.post(CLASSIFY, content=png(7))).status_code == 200
    assert engines.made[0].batches == [1, 7]


async def test_a_stopping_server_finishes_its_calls_and_refuses_new_ones(tmp_path: Path) -> None:
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
