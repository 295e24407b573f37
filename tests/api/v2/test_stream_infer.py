"""Streams answer every request in order, and an error does not end the stream."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from server.api.rpc import streaming
from server.api.stubs import open_inference_pb2 as pb
from tests.api.v2.tensor_calls import (
    OPEN_INFERENCE,
    image,
    raw_bytes,
    rows,
    triton_client_of,
)
from tests.support import triton_clients as triton
from tests.support.serving import (
    CLASSES,
    MAX_BATCH,
    SHAPE,
    Mirrors,
    Served,
    loading,
    publish,
    serve,
)

METHOD = f"/{OPEN_INFERENCE.full_name}/ModelStreamInfer"


def request(of: int, **fields: Any) -> pb.ModelInferRequest:
    made: pb.ModelInferRequest = raw_bytes(rows(of).tobytes(), [1, *SHAPE])
    made.MergeFrom(pb.ModelInferRequest(**fields))
    return made


def opened(served: Served, channel: Any = None, timeout: float = 20) -> Any:
    """An open stream."""
    calls: Any = channel or served.channel
    return calls.stream_stream(METHOD)(timeout=timeout)


async def write(stream: Any, requests: Iterable[Any]) -> None:
    for message in requests:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        await stream.write(data)


async def answer(stream: Any) -> pb.ModelStreamInferResponse:
    data = await stream.read()
    assert isinstance(data, bytes), f"the stream has ended: {data}"
    return pb.ModelStreamInferResponse.FromString(data)


def counted(served: Served, code: str, model: str = "tiny") -> float:
    labels = {"method": "ModelStreamInfer", "code": code, "model": model}
    labels["version"] = "1" if model else ""
    registry = served.server.metrics.registry
    return registry.get_sample_value("convserve_requests_total", labels) or 0.0


async def until_waiting(served: Served, rows: int) -> None:
    (model,) = served.server.registry.serving_models()
    while model.executor.queued_rows("tiny/1") != rows:
        await asyncio.sleep(0.001)


async def test_tritons_asyncio_client_gets_every_response_in_order(tmp_path: Path) -> None:
    publish(tmp_path)
    count = 3 * streaming.STREAM_DEPTH
    async with triton_client_of(tmp_path) as (served, client):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for n in range(count):
                inputs = image(rows(n % CLASSES, (n + 1) % CLASSES))
                yield {"model_name": "tiny", "inputs": inputs, "request_id": str(n)}

        found = []
        async for result, error in client.stream_infer(requests(), stream_timeout=20):
            assert error is None
            response = result.get_response()
            assert response.parameters["triton_final_response"].bool_param
            found.append((response.id, result.as_numpy("classes")[:, 0].tolist()))
        expected = [(str(n), [n % CLASSES, (n + 1) % CLASSES]) for n in range(count)]
        assert found == expected
        assert counted(served, "OK") == count


async def test_tritons_blocking_client_gets_results_and_errors_by_callback(tmp_path: Path) -> None:
    publish(tmp_path)

    def tour(target: str) -> None:
        results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with triton.sync.InferenceServerClient(target) as client:
            client.start_stream(callback=lambda result, error: results.put((result, error)))
            for n, model in enumerate(("tiny", "other", "tiny")):
                client.async_stream_infer(model, image(rows(n)), request_id=str(n))
            client.stop_stream()
            (first, none), (nothing, error), (last, _) = (results.get(timeout=20) for _ in "abc")
            assert (first.as_numpy("classes")[0, 0], last.as_numpy("classes")[0, 0]) == (0, 2)
            assert none is nothing is None
            assert error.message() == "NOT_FOUND: there is no model 'other'; known models: tiny"

    async with triton_client_of(tmp_path) as (served, _):
        await asyncio.to_thread(tour, served.target)


async def test_an_invalid_request_gets_an_error_and_the_stream_continues(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path) as (served, _):
        stream = opened(served)
        wrong = request(1, id="mine")
        wrong.inputs[0].name = "pixels"
        await write(stream, [wrong, b"\xff", request(1, id=129 * "i"), request(4, id="good")])
        await stream.done_writing()
        first = await answer(stream)
        assert first.error_message.startswith("INVALID_ARGUMENT: inputs[0].name: is 'pixels'")
        assert first.infer_response == pb.ModelInferResponse(id="mine")
        assert (await answer(stream)).error_message.startswith("INVALID_ARGUMENT: request: 1 bytes")
        long = await answer(stream)
        assert (long.error_message[:20], long.infer_response.id) == ("INVALID_ARGUMENT: id", "")
        good = await answer(stream)
        assert (good.error_message, good.infer_response.id) == ("", "good")
        assert not await stream.read()
        assert await stream.code() == StatusCode.OK
        assert counted(served, "OK") == 1
        assert counted(served, "INVALID_ARGUMENT") == 2
        assert counted(served, "INVALID_ARGUMENT", model="") == 1


async def test_requests_of_a_stream_share_batches_and_a_limited_number_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    monkeypatch.setattr(streaming, "STREAM_DEPTH", 1 + MAX_BATCH)
    engines = Mirrors(held=True)
    async with triton_client_of(tmp_path, load=loading(engines)) as (served, client):
        stream = opened(served)
        await write(stream, [request(0)])
        await engines.made[0].started.wait()
        await write(stream, [request(n) for n in range(1, 10)])
        await until_waiting(served, MAX_BATCH)
        assert await client.is_server_live()  # by now the server has read what it will read
        await until_waiting(served, MAX_BATCH)
        engines.made[0].release()
        found = [(await answer(stream)).infer_response for _ in range(10)]
        assert [int.from_bytes(r.raw_output_contents[0][:4], "little") for r in found] == [
            *range(10)
        ]
        await stream.done_writing()
    assert engines.made[0].batches[:2] == [0, 1]
    assert len(engines.made[0].batches) < 10


async def test_requests_of_a_cancelled_stream_never_reach_the_engine(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with triton_client_of(tmp_path, load=loading(engines)) as (served, client):
        first = asyncio.create_task(client.infer("tiny", image(rows(7))))
        await engines.made[0].started.wait()
        stream = opened(served)
        await write(stream, [request(n) for n in range(3)])
        await until_waiting(served, 3)
        stream.cancel()
        await until_waiting(served, 0)
        engines.made[0].release()
        await first
        while counted(served, "CANCELLED") < 3:
            await asyncio.sleep(0.001)
    assert engines.made[0].batches == [7]


async def test_the_deadline_of_a_stream_applies_to_its_requests(tmp_path: Path) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    async with triton_client_of(tmp_path, load=loading(engines)) as (served, _):
        stream = opened(served, timeout=1)
        await write(stream, [request(1)])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED
        while not counted(served, "DEADLINE_EXCEEDED"):
            await asyncio.sleep(0.001)
        engines.made[0].release()


async def test_a_stopping_server_answers_the_requests_it_has_read_and_ends_the_stream(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    engines = Mirrors(held=True)
    options = [("grpc.use_local_subchannel_pool", 1)]

    async with serve(tmp_path, load=loading(engines), grace_s=60) as served:
        channel: Any = grpc.aio.insecure_channel(served.target, options=options)
        idle, busy = opened(served, channel), opened(served, channel)
        await write(idle, [request(2)])
        await engines.made[0].started.wait()
        await write(busy, [request(5)])
        await until_waiting(served, 1)
        server = served.server

        async def release() -> None:
            while server.accepting:
                await asyncio.sleep(0.001)
            engines.made[0].release()

        releasing = asyncio.create_task(release())
    await releasing
    for stream, of in ((idle, 2), (busy, 5)):
        response = (await answer(stream)).infer_response
        assert int.from_bytes(response.raw_output_contents[0][:4], "little") == of
        assert await stream.code() == StatusCode.UNAVAILABLE
        assert await stream.details() == "the server is stopping"
    await channel.close()


async def test_a_stream_counts_as_a_call_in_progress(tmp_path: Path) -> None:
    publish(tmp_path)
    async with triton_client_of(tmp_path, max_calls=2) as (served, _):
        first = opened(served)
        await write(first, [request(1)])
        assert not (await answer(first)).error_message
        second = opened(served)
        await write(second, [request(1)])
        full = await answer(second)
        assert full.error_message.startswith("RESOURCE_EXHAUSTED: 2 calls are in progress")
        third = opened(served)
        assert await third.code() == StatusCode.RESOURCE_EXHAUSTED
        await first.done_writing()
        assert await first.code() == StatusCode.OK
        await write(second, [request(1)])
        assert not (await answer(second)).error_message
        await second.done_writing()
        assert await second.code() == StatusCode.OK
