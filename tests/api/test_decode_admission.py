"""Images are decoded only if their request is admitted, and the promise counts their decoding."""

from __future__ import annotations

import asyncio
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from PIL import Image

from server.api import content
from server.api.stubs import classify_pb2 as pb
from server.images.decode import decode
from tests.api.classify_calls import eventually, png
from tests.support.serving import Mirror, Mirrors, Served, loading, publish, serve


def request(*files: bytes) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=file) for file in files])


async def status(served: Served, files: list[bytes], timeout: float = 20.0) -> StatusCode:
    unary: Any = served.channel.unary_unary("/convserve.v1.Classifier/Classify")  # type: ignore[call-arg]
    call = unary(request(*files).SerializeToString(), timeout=timeout)
    code: StatusCode = await call.code()
    return code


async def test_in_overload_as_many_images_are_decoded_as_are_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(*arguments: Any) -> Any:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(content, "decode", counted)
    publish(tmp_path)
    mirrors = Mirrors(held=True)
    async with serve(
        tmp_path, load=loading(mirrors), queue_rows=8, max_images_per_call=8
    ) as served:
        running = asyncio.create_task(status(served, [png(1)]))
        await eventually(lambda: bool(mirrors.made) and mirrors.made[0].started.is_set())
        calls = [asyncio.create_task(status(served, [png(n), png(n)])) for n in range(40)]
        await eventually(lambda: sum(call.done() for call in calls) == 36)
        mirrors.made[0].release()
        codes = await asyncio.gather(running, *calls)
    assert codes.count(StatusCode.OK) == 1 + 4
    assert codes.count(StatusCode.RESOURCE_EXHAUSTED) == 36
    assert len(decoded) == 1 + 2 * 4


async def test_a_request_whose_images_cannot_be_decoded_in_time_is_refused_at_once(
    tmp_path: Path,
) -> None:
    file = BytesIO()
    Image.new("RGB", (2500, 2500)).save(file, "PNG")  # a small file that takes long
    large = file.getvalue()
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror), decode_threads=1) as served:
        seconds = 10.0
        for _ in range(3):
            began_s = time.monotonic()
            assert await status(served, [large]) == StatusCode.OK
            seconds = min(seconds, time.monotonic() - began_s)
        # The images of a request take 16 times as long as one; the deadline is far before that.
        calls = (status(served, [large] * 16, timeout=4 * seconds) for _ in range(2))
        began_s = time.monotonic()
        codes = await asyncio.gather(*calls)
        assert codes == [StatusCode.RESOURCE_EXHAUSTED] * 2
        assert time.monotonic() - began_s < 4 * seconds
        assert await status(served, [large]) == StatusCode.OK
