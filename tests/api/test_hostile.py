"""2,000 hostile requests get the right status and do not disturb a well-behaved client."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from PIL import Image

from server.api.stubs import classify_pb2 as pb
from tests.support.serving import (
    SERVICE,
    SHAPE,
    Mirror,
    loading,
    publish,
    raw,
    serve,
)

SEED = 20260101
REQUESTS = 2000
WARM_UP = 200
CALLERS = 24
MESSAGE_BYTES = 4 << 20
MAX_IMAGES = 256

OK, INVALID, NOT_FOUND = StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND


class Attack(NamedTuple):
    method: str
    data: bytes
    allowed: set[StatusCode]


async def test_hostile_requests_get_the_right_status_and_disturb_no_other_client(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    attacks = list(islice(hostile(random.Random(SEED)), REQUESTS))
    async with serve(
        tmp_path,
        load=loading(Mirror),
        queue_rows=MAX_IMAGES,
        max_images_per_call=MAX_IMAGES,
        max_message_bytes=MESSAGE_BYTES,
        max_bytes_in_progress=MESSAGE_BYTES,
        max_image_pixels=1_000_000,
        limit_s=400,
    ) as served:
        waiting = iter(attacks)
        statuses: Counter[StatusCode] = Counter()
        wrong: list[str] = []
        turn = asyncio.Semaphore(0)  # of the well-behaved client, after every ten attacks

        async def attack() -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(served.target, options=options) as channel:
                for one in waiting:
                    call: Any = channel.unary_unary(SERVICE + one.method)  # type: ignore[call-arg]
                    call = call(one.data, timeout=30)
                    status = await call.code()
                    statuses[status] += 1
                    if sum(statuses.values()) % 10 == 0:
                        turn.release()
                    if status not in one.allowed:
                        wrong.append(f"{status}: {await call.details()}: {one.data[:80]!r}")
                    elif status == INVALID and not await _names_a_field(call):
                        wrong.append(f"names no field: {await call.details()}")

        async def behave() -> None:
            for _ in range((REQUESTS - WARM_UP) // 10):
                await turn.acquire()
                for request in (raw(1, 2, 3), pb.ClassifyRequest(model="tiny", images=[_file(4)])):
                    answer = await served.classify(request)
                    best = [result.classes[0].index for result in answer.results]
                    assert best == ([1, 2, 3] if request.HasField("pixels") else [4])

        for one in islice(waiting, WARM_UP):  # memory that is allocated once is no leak
            await served.channel.unary_unary(SERVICE + one.method)(one.data).code()  # type: ignore[call-arg]
        before = _resident_bytes()
        async with asyncio.TaskGroup() as callers:
            callers.create_task(behave())
            for _ in range(CALLERS):
                callers.create_task(attack())
        growth = _resident_bytes() - before

        assert not wrong, "\n".join(wrong[:20])
        assert sum(statuses.values()) == REQUESTS - WARM_UP
        assert statuses[INVALID] > 500
        assert statuses[NOT_FOUND] > 50
        assert statuses[OK] > 50
        assert growth < 32 << 20

        # These only fit if no image is still counted as decoding or queued. The large message only
        # fits if no other is still counted as in flight.
        images = [_file(n % 10) for n in range(MAX_IMAGES)]
        answer = await served.classify(pb.ClassifyRequest(model="tiny", images=images))
        assert [result.classes[0].index for result in answer.results] == [
            n % 10 for n in range(MAX_IMAGES)
        ]
        largest = pb.GetModelRequest(model="x" * (MESSAGE_BYTES - 16)).SerializeToString()
        call: Any = served.channel.unary_unary(SERVICE + "GetModel")  # type: ignore[call-arg]
        assert await call(largest).code() == NOT_FOUND


def hostile(rng: random.Random) -> Iterator[Attack]:
    """One attack of each kind after the other, forever."""
    files = _files()
    requests = [
        raw(1, 2, top_k=3, request_id="x").SerializeToString(),
        pb.ClassifyRequest(model="tiny", images=[_file(1)], version=1).SerializeToString(),
    ]
    while True:
        for file in files:
            yield _classify({OK, INVALID}, pb.Image(encoded=_mutated(rng, file)))
            yield _classify({INVALID}, pb.Image(encoded=file[: rng.randrange(len(file) // 3)]))
            yield _classify({OK, INVALID}, pb.Image(encoded=file + rng.randbytes(20)))
            yield _classify({INVALID}, pb.Image(encoded=file[:4] + rng.randbytes(60)))
        yield _classify({INVALID}, pb.Image(encoded=rng.randbytes(rng.randrange(100))))
        yield _classify({INVALID}, pb.Image(encoded=("<svg>\N{SNOWMAN}" * 9).encode()))
        yield _classify({INVALID}, _file(1), pb.Image(), _file(2))
        yield _classify({INVALID}, *[_file(1)] * (MAX_IMAGES + 1))
        yield _classify({INVALID})
        yield _classify({INVALID}, _raw(rng), _file(1))
        yield _classify({INVALID}, _raw(rng))
        yield _pixels(rng)
        yield _pixels(rng)
        yield _request({INVALID}, raw(1), images=[_file(1)])
        yield _request({OK}, raw(1), top_k=rng.choice((0, 1, 10)))
        yield _request({INVALID}, raw(1), top_k=rng.choice((11, 2**31, 2**32 - 1)))
        yield _request({INVALID}, raw(1), priority=rng.choice((10, 2**31, 2**32 - 1)))
        yield _request({INVALID}, raw(1), version=rng.choice((-1, -(2**63))))
        yield _request({NOT_FOUND}, raw(1), version=rng.choice((2, 2**63 - 1)))
        yield _request({NOT_FOUND}, raw(1), model=_name(rng))
        yield _request({INVALID}, raw(1), model="")
        yield _request({INVALID}, raw(1), request_id=_name(rng) + "x" * 129)
        yield Attack("Classify", rng.randbytes(rng.randrange(1, 200)), {INVALID, NOT_FOUND})
        yield Attack("Classify", b"\x1a\x00" * rng.randrange(257, 50_000), {INVALID})
        yield Attack("Classify", b"\x0a\x04tin\xff" + requests[0], {INVALID})
        for request in requests:
            yield Attack("Classify", _mutated(rng, request), {OK, INVALID, NOT_FOUND})
            yield Attack("Classify", request[: rng.randrange(len(request))], {INVALID, NOT_FOUND})
        name = pb.GetModelRequest(model=_name(rng)).SerializeToString()
        yield Attack("GetModel", name, {NOT_FOUND})
        yield Attack("GetModel", _mutated(rng, name), {INVALID, NOT_FOUND})
        yield Attack("ListModels", rng.randbytes(rng.randrange(50)), {OK, INVALID})


def _classify(allowed: set[StatusCode], *images: pb.Image) -> Attack:
    request = pb.ClassifyRequest(model="tiny", images=images)
    return Attack("Classify", request.SerializeToString(), allowed)


def _request(allowed: set[StatusCode], request: pb.ClassifyRequest, **fields: Any) -> Attack:
    request.MergeFrom(pb.ClassifyRequest(**fields))
    for name, value in fields.items():
        if not value:
            request.ClearField(name)  # type: ignore[arg-type]
    return Attack("Classify", request.SerializeToString(), allowed)


def _raw(rng: random.Random) -> pb.Image:
    """Pixels with the wrong length, or with impossible dimensions."""
    sides = (0, 1, 8, 6, 65_536, 2**32 - 1)
    height, width, channels = (
        rng.choice(sides),
        rng.choice(sides),
        rng.choice((0, 1, 3, 4, 2**32 - 1)),
    )
    expected = height * width * channels
    length = rng.choice([n for n in (0, 1, 143, 144, 145, 500) if n != expected])
    data = bytes(length)
    return pb.Image(raw=pb.RawImage(height=height, width=width, channels=channels, data=data))


def _pixels(rng: random.Random) -> Attack:
    height, width, channels = SHAPE
    pixels = pb.RawImages(count=2, height=height, width=width, channels=channels)
    pixels.data = bytes(2 * height * width * channels + rng.choice((-1, 1, 144, -144)))
    field = rng.choice(("count", "height", "width", "channels"))
    setattr(pixels, field, rng.choice((0, 5, 2**16, 2**31, 2**32 - 1)))
    return _request({INVALID}, pb.ClassifyRequest(model="tiny"), pixels=pixels)


def _name(rng: random.Random) -> str:
    alphabet = "tiny./\\%'\"\0\n\r\x1b\x7f\u202e\N{SNOWMAN}\U0001f40d"
    return "T" + "".join(rng.choices(alphabet, k=rng.choice((1, 10, 1000))))


def _mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, removed, doubled or inserted."""
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(mutated) + 1)
        match rng.randrange(4):
            case 0:
                mutated[at : at + 1] = rng.randbytes(1)
            case 1:
                del mutated[at : at + rng.randint(1, 8)]
            case 2:
                mutated[at:at] = mutated[at : at + rng.randint(1, 64)]
            case 3:
                mutated[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff"))
    return bytes(mutated)


def _files() -> list[bytes]:
    """An image of 40 x 30 pixels in every format, and in some variants."""
    rng = np.random.default_rng(SEED)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    files = []
    for name, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
    ):
        file = BytesIO()
        image.convert(mode).save(file, name, **options)
        files.append(file.getvalue())
    return files


def _file(index: int) -> pb.Image:
    """A file that a Mirror assigns to that class."""
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[0, 0, 0] = index
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pb.Image(encoded=file.getvalue())


async def _names_a_field(call: Any) -> bool:
    metadata: dict[str, Any] = dict(iter(await call.trailing_metadata()))
    request = BadRequest()
    status = Status.FromString(metadata["grpc-status-details-bin"])
    return status.details[0].Unpack(request) and bool(request.field_violations[0].field)


def _resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
