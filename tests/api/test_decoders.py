"""Promise: images wait for threads and for memory within limits, and leave nothing behind.

The last test compares the memory of a server with the formula in docs/operations.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image

from server.api.decoders import DecoderQueue, Decoders, Work
from server.api.stubs import classify_pb2 as pb
from server.errors import InvalidInput, Overloaded
from server.images.decode import decode
from server.images.input_spec import ImageLimits, InputSpec
from server.images.memory import MemoryBudget
from server.security.principal import LOCAL_CALLER
from tests.support.server_process import CLASSIFY, next_event, server_process
from tests.support.serving import publish

SPEC = InputSpec(32, 32, 3)
MIB = 1 << 20


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    file = BytesIO()
    image = Image.new(mode, (width, height), "red")
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))  # else its alpha channel is dropped at once
    image.save(file, "PNG")
    return file.getvalue()


@asynccontextmanager
async def decoders(memory_bytes: int, max_waiting: int = 8) -> AsyncIterator[Decoders]:
    limits = ImageLimits(memory=MemoryBudget(memory_bytes))
    with ThreadPoolExecutor(4) as threads:
        yield DecoderQueue(threads, limits, threads=4, max_waiting=max_waiting).of(LOCAL_CALLER)


def work(one: Decoders, *files: bytes) -> tuple[list[Any], list[Work]]:
    arguments = [(file, SPEC, one.limits, "images[0]") for file in files]
    return [None] * len(files), [(n, decode, given) for n, given in enumerate(arguments)]


async def test_images_that_do_not_fit_wait_for_memory() -> None:
    """Each needs 5.3 MB of 6."""
    async with decoders(6_000_000) as one, asyncio.timeout(60):
        large = png(1300, 1000)
        results = await asyncio.gather(
            *(one.rows(*work(one, large, png(10, 10))) for _ in range(4))
        )
        for pixels in results:
            assert pixels.shape == (2, 32, 32, 3)
            assert np.all(pixels == (255, 0, 0))
        assert one.limits.memory.used_bytes == 0


async def test_a_request_that_leaves_stops_waiting_for_memory() -> None:
    async with decoders(6_000_000) as one, asyncio.timeout(60):
        memory = one.limits.memory
        with memory.hold(5_000_000):
            waiting = asyncio.create_task(one.rows(*work(one, png(1300, 1000))))
            while not memory.waiting:
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not memory.waiting
        assert memory.used_bytes == 0
        assert (await one.rows(*work(one, png(1300, 1000)))).shape == (1, 32, 32, 3)


async def test_images_that_wait_for_memory_count_as_waiting() -> None:
    async with decoders(6_000_000, max_waiting=2) as one, asyncio.timeout(60):
        with one.limits.memory.hold(5_000_000):
            waiting = asyncio.create_task(one.rows(*work(one, png(1300, 1000))))
            while not one.limits.memory.waiting:
                await asyncio.sleep(0.001)
            with pytest.raises(Overloaded, match="already waiting"):
                await one.rows(*work(one, png(9, 9), png(9, 9)))
        await waiting


async def test_an_image_that_can_never_fit_is_an_error_of_the_request() -> None:
    async with decoders(2_000_000) as one:
        with pytest.raises(InvalidInput, match=r"bytes of memory to decode; at most 2,000,000"):
            await one.rows(*work(one, png(1300, 1000)))


async def test_a_damaged_image_gives_its_memory_back() -> None:
    async with decoders(6_000_000) as one, asyncio.timeout(60):
        bmp = BytesIO()
        Image.new("RGB", (1300, 1000)).save(bmp, "BMP")
        for _ in range(2):
            given = [one.rows(*work(one, bmp.getvalue()[:-9000])) for _ in range(3)]
            for result in await asyncio.gather(*given, return_exceptions=True):
                assert isinstance(result, InvalidInput)
        assert one.limits.memory.used_bytes == 0


def peak_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
async def test_a_server_takes_no_more_memory_than_the_docs_say(tmp_path: Path) -> None:
    """Six PNGs of 7,000 x 4,000 take 260 MB each to decode, and 100 KB to send."""
    publish(tmp_path)
    in_progress, decoding, image, threads = 8 * MIB, 280 * MIB, 1 * MIB, 6
    arguments = (
        f"--max-bytes-in-progress={in_progress}",
        f"--max-message-bytes={in_progress}",
        f"--max-decoding-bytes={decoding}",
        f"--max-image-bytes={image}",
        f"--decode-threads={threads}",
    )
    request = pb.ClassifyRequest(
        model="tiny", images=[pb.Image(encoded=png(7000, 4000, "RGBA"))]
    ).SerializeToString()
    async with server_process("--repo", str(tmp_path), *arguments) as server:
        listening = await next_event(server, "listening")
        await next_event(server, "version_loaded")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{listening['port']}") as channel:
            unary: Any = channel.unary_unary
            small = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=png(9, 9))])
            assert await unary(CLASSIFY)(small.SerializeToString()).code() == StatusCode.OK
            before = peak_bytes(server.pid)
            calls = [unary(CLASSIFY)(request, timeout=300) for _ in range(threads)]
            codes = await asyncio.gather(*(call.code() for call in calls))
        growth = peak_bytes(server.pid) - before
    assert codes == [StatusCode.OK] * threads
    assert 240 * MIB < growth < 4 * in_progress + decoding + threads * (image + 80 * MIB)
