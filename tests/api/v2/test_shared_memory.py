"""Pixels are read from shared memory and results written there; a changed file harms no other."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from grpc import StatusCode

from server.api.stubs import open_inference_pb2 as pb
from server.api.v2 import shared_memory
from server.api.v2.metadata import SHARED_MEMORY
from server.api.v2.service import SHARED_MEMORY_METHODS
from server.api.v2.shared_memory import FOLDER, SharedMemoryRegions
from server.errors import InvalidInput
from tests.api.v2.tensor_calls import (
    failure,
    image,
    infer,
    png,
    refused,
    rows,
    send,
)
from tests.support import triton_clients as triton
from tests.support.serving import (
    SHAPE,
    Mirror,
    Mirrors,
    Served,
    loading,
    publish,
    serve,
)
from tests.support.triton_clients import InferInput, InferRequestedOutput

TOP_K = 10
ROW_BYTES = int(np.prod(SHAPE))
BYTES = 4096


@pytest.fixture
def file() -> Iterator[Path]:
    """A file of zeros in shared memory."""
    path = FOLDER / f"convserve-test-{uuid.uuid4().hex}"
    path.write_bytes(bytes(BYTES))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@asynccontextmanager
async def lending(repo: Path, **options: Any) -> AsyncIterator[tuple[Served, Any]]:
    """A server with shared memory and Mirror engines, and Triton's asyncio client for it."""
    publish(repo)
    defaults: dict[str, Any] = {"load": loading(Mirror), "allow_shared_memory": True}
    async with (
        serve(repo, **defaults | options) as served,
        triton.aio.InferenceServerClient(served.target) as client,
    ):
        yield served, client


def lent(*shape: int, name: str = "image", size: int = 0, offset: int = 0) -> Any:
    """An input in the region "mine"."""
    tensor = InferInput(name, shape, "UINT8" if name == "image" else "BYTES")
    tensor.set_shared_memory("mine", size or int(np.prod(shape)), offset)
    return [tensor]


def held(*paths: Path) -> int:
    """Number of open descriptors below the paths, deleted files included."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            target = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
            count += any(Path(target).is_relative_to(path) for path in paths)
    return count


async def test_pixels_are_read_from_regions_and_results_written_to_them(tmp_path: Path) -> None:
    of = [(7 * n + 3) % 12 for n in range(10)]  # three batches
    pixels = rows(*of)
    key = f"convserve-test-{uuid.uuid4().hex}"
    async with lending(tmp_path) as (_, client):
        plain = await client.infer("tiny", image(pixels))
        handle = shm.create_shared_memory_region("mine", "/" + key, BYTES)
        try:
            shm.set_shared_memory_region(handle, [pixels], offset=100)
            await client.register_system_shared_memory("mine", "/" + key, BYTES - 50, 50)
            classes = InferRequestedOutput("classes")
            classes.set_shared_memory("mine", 10 * TOP_K * 4, 2000)
            scores = InferRequestedOutput("scores")
            scores.set_shared_memory("mine", 10 * TOP_K * 4 + 1, 2400)
            outputs = [classes, InferRequestedOutput("probabilities"), scores]
            answer = await client.infer("tiny", lent(10, *SHAPE, offset=50), outputs=outputs)
            found = shm.get_contents_as_numpy(handle, np.int32, [10, TOP_K], 2050)
            assert found.tolist() == plain.as_numpy("classes").tolist()
            assert found[:, 0].tolist() == of
            best = shm.get_contents_as_numpy(handle, np.float32, [10, TOP_K], 2450)
            assert (best == plain.as_numpy("scores")).all()
            given = answer.as_numpy("probabilities")
            assert (given == plain.as_numpy("probabilities")).all()
            where = answer.get_output("classes").parameters
            assert where["shared_memory_region"].string_param == "mine"
            assert where["shared_memory_offset"].int64_param == 2000
            assert where["shared_memory_byte_size"].int64_param == 10 * TOP_K * 4
        finally:
            shm.destroy_shared_memory_region(handle)


async def test_files_are_read_from_regions_too(tmp_path: Path, file: Path) -> None:
    elements = b"".join(len(image).to_bytes(4, "little") + image for image in (png(4), png(8)))
    file.write_bytes(elements.ljust(BYTES, b"\0"))
    async with lending(tmp_path) as (_, client):
        await client.register_system_shared_memory("mine", file.name, BYTES)
        tensors = lent(2, name="encoded", size=len(elements))
        answer = await client.infer("tiny", tensors)
        assert answer.as_numpy("classes")[:, 0].tolist() == [4, 8]
        long = lent(2, name="encoded", size=len(elements) + 1)
        assert "within the length of element 2" in (await failure(client.infer("tiny", long)))[1]


async def test_regions_are_listed_and_unregistered(tmp_path: Path, file: Path) -> None:
    async with lending(tmp_path) as (_, client):
        await client.register_system_shared_memory("mine", file.name, 100, 20)
        await client.register_system_shared_memory("other", "/" + file.name, BYTES)
        regions = (await client.get_system_shared_memory_status()).regions
        assert {(r.name, r.key, r.offset, r.byte_size) for r in regions.values()} == {
            ("mine", file.name, 20, 100),
            ("other", "/" + file.name, 0, BYTES),
        }
        assert list((await client.get_system_shared_memory_status("mine")).regions) == ["mine"]
        await client.unregister_system_shared_memory("mine")
        await client.unregister_system_shared_memory("mine")  # a second time is no error
        assert (
            "no such region" in (await failure(client.get_system_shared_memory_status("mine")))[1]
        )
        assert held(file) == 1
        await client.unregister_system_shared_memory()
        assert not (await client.get_system_shared_memory_status()).regions
        assert held(file) == 0
        await client.register_system_shared_memory("mine", file.name, 100)
    assert held(file) == 0  # a stopped server keeps none open


async def test_regions_work_by_http_too(tmp_path: Path, file: Path) -> None:
    file.write_bytes(rows(6).tobytes().ljust(BYTES, b"\0"))
    http = triton.http

    def tour(target: str) -> None:
        with http.InferenceServerClient(target, network_timeout=20) as client:
            client.register_system_shared_memory("mine", file.name, BYTES)
            (region,) = client.get_system_shared_memory_status()
            assert (region["name"], region["byte_size"]) == ("mine", BYTES)
            tensor = http.InferInput("image", [1, *SHAPE], "UINT8")
            tensor.set_shared_memory("mine", ROW_BYTES)
            classes = http.InferRequestedOutput("classes")
            classes.set_shared_memory("mine", TOP_K * 4, 1000)
            scores = http.InferRequestedOutput("scores")
            answer = client.infer("tiny", [tensor], outputs=[classes, scores])
            assert answer.as_numpy("scores")[0, 0] == 0.5
            # With parameters, the C++ client would expect binary data.
            assert answer.get_output("classes").keys() == {"name", "datatype", "shape"}
            client.unregister_system_shared_memory("mine")
            assert client.get_system_shared_memory_status() == []

    async with lending(tmp_path) as (served, _):
        await asyncio.to_thread(tour, served.http.removeprefix("http://"))
    found = np.frombuffer(file.read_bytes(), "<i4", TOP_K, 1000)
    assert found[0] == 6


async def test_shared_memory_is_off_by_default(tmp_path: Path, file: Path) -> None:
    async with lending(tmp_path, allow_shared_memory=False) as (served, client):
        assert SHARED_MEMORY not in (await client.get_server_metadata()).extensions
        for method in SHARED_MEMORY_METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(served, method, pb.SystemSharedMemoryStatusRequest())
            assert caught.value.code() == StatusCode.UNIMPLEMENTED
        code, message = await failure(client.infer("tiny", lent(1, *SHAPE)))
        assert code == "INVALID_ARGUMENT"
        assert "without --allow-shared-memory" in message
    async with lending(tmp_path / "other") as (_, client):
        assert SHARED_MEMORY in (await client.get_server_metadata()).extensions


def test_only_regular_files_of_the_folder_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").write_bytes(b"1234")
    secret = tmp_path / "secret"
    secret.write_bytes(b"1234")
    (folder / "link").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    (folder / "file").write_bytes(b"1234")
    regions = SharedMemoryRegions(folder)
    paths = ["", "/", ".", "..", "/..", "../secret", "sub/file", "//file", str(secret), "a\0b"]
    for key in (*paths, "link", "pipe", "sub", "missing", 300 * "x", "\udcff"):
        with pytest.raises(InvalidInput, match="^key: is "):
            regions.register("mine", key, 0, 1)
    for offset, size in ((0, 5), (4, 1), (-1, 1), (1 << 63, 1), (0, 1 << 63), (0, 0), (0, -1)):
        with pytest.raises(InvalidInput, match="^byte_size: is "):
            regions.register("mine", "file", offset, size)
    for name in ("", 129 * "n"):
        with pytest.raises(InvalidInput, match="^name: has "):
            regions.register(name, "file", 0, 4)
    assert held(tmp_path) == 0
    regions.register("mine", "file", 0, 4)
    with pytest.raises(InvalidInput, match="registered already"):
        regions.register("mine", "file", 0, 4)
    regions.unregister()
    assert held(tmp_path) == 0


async def test_wrong_windows_are_refused_by_name(tmp_path: Path, file: Path) -> None:
    good = lent(1, *SHAPE)[0]._get_tensor()
    region = "shared_memory_region"

    def call(outputs: Any = (), raw: bytes = b"", **changes: Any) -> Any:
        request = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[raw] if raw else [])
        request.inputs.add().ParseFromString(good.SerializeToString())
        parameters = request.inputs[0].parameters
        for name, value in changes.items():
            if value is None:
                del parameters[name]
            elif isinstance(value, str):
                parameters[name].string_param = value
            else:
                parameters[name].int64_param = value
        request.outputs.extend(outputs)
        return request

    def with_files(entries: int, typed: bool = False) -> Any:
        request = call()
        encoded = request.inputs.add(name="encoded", datatype="BYTES", shape=[1])
        request.raw_input_contents.extend([b"whatever"] * entries)
        if typed:
            encoded.contents.bytes_contents.append(b"whatever")
        return request

    typed = call()
    typed.inputs[0].contents.uint_contents.append(0)
    small = pb.ModelInferRequest.InferRequestedOutputTensor(name="classes")
    small.parameters[region].string_param = "mine"
    small.parameters["shared_memory_byte_size"].int64_param = 39
    texts = pb.ModelInferRequest.InferRequestedOutputTensor()
    texts.CopyFrom(small)
    texts.name = "scores"
    texts.parameters["classification"].int64_param = 5
    texts.parameters["shared_memory_byte_size"].int64_param = 400
    cases = [
        (call(shared_memory_region="other"), "'other'; no such region is registered"),
        (call(shared_memory_byte_size=143), "has 143 bytes; 'image' of shape [1, 8, 6, 3] needs"),
        (call(shared_memory_byte_size=BYTES), "is 4,096 bytes from offset 0 on; region 'mine' has"),
        (call(shared_memory_offset=BYTES), "is 144 bytes from offset 4,096 on"),
        (call(shared_memory_offset=-1), "parameters[shared_memory_offset]: is -1; 0 to"),
        (call(shared_memory_offset=1 << 62), "region 'mine' has 4,000"),
        (call(shared_memory_byte_size=None), "parameters[shared_memory_byte_size]: is missing"),
        (call(shared_memory_byte_size="1"), "must be a whole number"),
        (call(shared_memory_region=None), "[shared_memory_byte_size]: is given without shared_mem"),
        (call(raw=bytes(ROW_BYTES)), "raw_input_contents: has 1 entries; none is needed"),
        (typed, "and the contents of 'image' too; give one of them"),
        (with_files(2), "raw_input_contents: has 2 entries; one is needed, for 'encoded'"),
        (with_files(1, typed=True), "is given, and the contents of 'encoded' too"),
        (call([small]), "is 39; 'classes' of 1 images needs 40"),
        (call([texts]), "and classification too, whose texts only fit into the response"),
    ]
    async with lending(tmp_path) as (served, client):
        await client.register_system_shared_memory("mine", file.name, 4000)
        for request, words in cases:
            assert words in await refused(served, request)
        assert await infer(served, call())
        assert await infer(served, with_files(1))  # the files are ignored
        await client.unregister_system_shared_memory()
        assert held(file) == 0  # no refused request keeps it open


def test_regions_are_limited_and_abandoned_ones_are_forgotten(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    regions = SharedMemoryRegions()
    regions.register("one", file.name, 0, 1)
    regions.register("two", file.name, 0, 1)
    with pytest.raises(InvalidInput, match="more than 2 regions"):
        regions.register("three", file.name, 0, 1)
    os.rename(file, kept := file.with_suffix(".kept"))
    file.write_bytes(b"another one")
    try:
        used = regions.window("field", "one", 0, 1)
        kept.unlink()
        with pytest.raises(InvalidInput, match="more than 2 regions"):
            regions.register("three", file.name, 0, 1)  # it was used less than a minute ago
        monkeypatch.setattr(shared_memory, "FORGET_S", 0.0)
        regions.register("three", file.name, 0, 1)
        assert [region.name for region in regions.status()] == ["one", "three"]
        assert bytes(used.read()) == b"\0"
        used.close()
    finally:
        regions.unregister()


async def test_a_region_that_shrinks_fails_only_its_own_request(tmp_path: Path, file: Path) -> None:
    engines = Mirrors(held=True)
    file.write_bytes(rows(5, 6).tobytes().ljust(BYTES, b"\0"))
    async with lending(tmp_path, load=loading(engines)) as (served, client):
        (model,) = served.server.registry.serving_models()
        await client.register_system_shared_memory("mine", file.name, BYTES)
        first = asyncio.create_task(client.infer("tiny", image(rows(1))))
        await engines.made[0].started.wait()
        shrinking = asyncio.create_task(client.infer("tiny", lent(2, *SHAPE)))
        mate = asyncio.create_task(client.infer("tiny", image(rows(9))))
        while model.executor.queued_rows("tiny/1") < 3:
            await asyncio.sleep(0.001)
        os.truncate(file, ROW_BYTES)
        engines.made[0].release()
        code, message = await failure(shrinking)
        assert code == "INVALID_ARGUMENT"
        assert f"which has become smaller: {ROW_BYTES} bytes" in message
        assert (await first).as_numpy("classes")[0, 0] == 1
        assert (await mate).as_numpy("classes")[0, 0] == 9
        outputs = [InferRequestedOutput("classes")]
        outputs[0].set_shared_memory("mine", 40, 1000)
        code, message = await failure(client.infer("tiny", image(rows(1)), outputs=outputs))
        assert "has become smaller" in message
        assert file.stat().st_size == ROW_BYTES  # nothing was written after its end
        again = await client.infer("tiny", lent(1, *SHAPE))
        assert again.as_numpy("classes")[0, 0] == 5


async def test_an_unregistered_or_deleted_region_serves_requests_in_progress(
    tmp_path: Path, file: Path
) -> None:
    engines = Mirrors(held=True)
    file.write_bytes(rows(5).tobytes().ljust(BYTES, b"\0"))
    async with lending(tmp_path, load=loading(engines)) as (served, client):
        (model,) = served.server.registry.serving_models()
        await client.register_system_shared_memory("mine", file.name, BYTES)
        first = asyncio.create_task(client.infer("tiny", image(rows(1))))
        await engines.made[0].started.wait()
        waiting = asyncio.create_task(client.infer("tiny", lent(1, *SHAPE)))
        while not model.executor.queued_rows("tiny/1"):
            await asyncio.sleep(0.001)
        await client.unregister_system_shared_memory("mine")
        file.unlink()
        assert held(file) == 1
        engines.made[0].release()
        assert (await waiting).as_numpy("classes")[0, 0] == 5
        await first
        assert held(file) == 0
