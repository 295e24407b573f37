"""Quotas of principals, as clients of every protocol see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc.error_details_pb2 import RetryInfo

from tests.api.classify_calls import details, eventually, failure, metric, trailers, violation
from tests.security.credentials import OPERATOR, TEAM_A, bearer, token_lines
from tests.security.guarded import (
    CLASSIFIER,
    OPEN_INFERENCE,
    SEEN,
    Guarded,
    as_metadata,
    classify_request,
    guarded,
    infer_json,
    infer_request,
)
from tests.support.serving import Mirrors, loading

TEAM, OTHER = [bearer(TEAM_A)], [bearer(OPERATOR)]


@asynccontextmanager
async def limited(folder: Path, quota: str, **options: Any) -> AsyncIterator[Guarded]:
    """A server with two principals, of which `team` has a quota."""
    text = f"""
[principals.team]
roles = ["classify", "observe"]
{quota}

[principals.other]
roles = ["classify", "observe"]

{token_lines("team", TEAM_A)}
{token_lines("other", OPERATOR)}
"""
    async with guarded(folder, text, **options) as server:
        yield server


def classify(server: Guarded, headers: Sequence[Any], images: int = 1) -> Any:
    request = classify_request()
    request.pixels.count = images
    request.pixels.data *= images
    unary: Any = server.served.channel.unary_unary
    return unary(CLASSIFIER + "Classify")(
        request.SerializeToString(), metadata=as_metadata(headers), timeout=20
    )


def retry_s(error: grpc.aio.AioRpcError) -> float:
    info = RetryInfo()
    assert details(error).details[0].Unpack(info)
    return float(info.retry_delay.ToTimedelta().total_seconds())


async def test_the_quota_is_shared_by_all_protocols_and_says_when_to_retry(tmp_path: Path) -> None:
    async with limited(tmp_path, "images_per_s = 0.01\nburst = 5") as server:
        await classify(server, TEAM, images=3)
        call = server.call(OPEN_INFERENCE + "ModelInfer", infer_request(), TEAM)
        assert (await call)[0] is grpc.StatusCode.OK
        response = await server.rest("POST", f"/v2/models/{SEEN}/infer", TEAM, json=infer_json())
        assert response.status_code == 200
        error = await failure(classify(server, TEAM))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the quota of team is used up: 0.01 images/s, 5 at once"
        assert trailers(error)["convserve-refusal"] == "quota"
        assert 90 < retry_s(error) <= 100
        assert 90_000 < int(trailers(error)["grpc-retry-pushback-ms"]) <= 100_000
        response = await server.rest("POST", f"/v2/models/{SEEN}/infer", TEAM, json=infer_json())
        assert response.status_code == 429
        assert response.headers["convserve-refusal"] == "quota"
        assert 90 < int(response.headers["retry-after"]) <= 100
        await classify(server, OTHER)
        registry = server.served.server.metrics.registry
        assert metric(registry, "convserve_refused_total", model=SEEN, reason="quota") == 2


async def test_a_request_larger_than_the_burst_is_refused_for_good(tmp_path: Path) -> None:
    async with limited(tmp_path, "images_per_s = 100\nburst = 2") as server:
        error = await failure(classify(server, TEAM, images=3))
        assert violation(error)[0] == "images"
        assert "allows 2 at once (burst)" in violation(error)[1]
        await classify(server, TEAM, images=2)


async def test_what_the_server_refuses_for_itself_is_not_charged(tmp_path: Path) -> None:
    mirrors = Mirrors(held=True)
    options = {"load": loading(mirrors), "queue_rows": 4, "max_images_per_call": 4}
    async with limited(tmp_path, "images_per_s = 0.01\nburst = 8", **options) as server:
        running = asyncio.create_task(answer(classify(server, TEAM)))
        made = mirrors.made
        await eventually(lambda: any(mirror.started.is_set() for mirror in made))
        waiting = asyncio.create_task(answer(classify(server, TEAM, images=4)))
        executor = next(iter(server.served.server.registry.serving_models())).executor
        await eventually(lambda: executor.queued_rows(f"{SEEN}/1") == 4)
        for _ in range(4):  # 3 are left of the quota
            error = await failure(classify(server, TEAM, images=3))
            assert trailers(error)["convserve-refusal"] == "overloaded"
        for mirror in made:
            mirror.release()
        await asyncio.gather(running, waiting)
        await classify(server, TEAM, images=3)
        assert trailers(await failure(classify(server, TEAM)))["convserve-refusal"] == "quota"


async def test_calls_in_progress_are_limited_for_each_principal(tmp_path: Path) -> None:
    mirrors = Mirrors(held=True)
    async with limited(tmp_path, "max_calls = 2", load=loading(mirrors)) as server:
        running = [asyncio.create_task(answer(classify(server, TEAM))) for _ in range(2)]
        await eventually(lambda: in_progress(server, mirrors) == 2)
        error = await failure(classify(server, TEAM))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "team has 2 calls in progress; its quota allows 2"
        assert trailers(error)["convserve-refusal"] == "quota"
        response = await server.rest("POST", f"/v2/models/{SEEN}/infer", TEAM, json=infer_json())
        assert (response.status_code, response.headers["convserve-refusal"]) == (429, "quota")
        other = asyncio.create_task(answer(classify(server, OTHER)))
        await eventually(lambda: in_progress(server, mirrors) == 3)
        for mirror in mirrors.made:
            mirror.release()
        await asyncio.gather(*running, other)
        await classify(server, TEAM)


async def test_one_principal_cannot_use_up_the_calls_in_progress(tmp_path: Path) -> None:
    mirrors = Mirrors(held=True)
    async with limited(tmp_path, "", load=loading(mirrors), max_calls=18) as server:
        flood = [asyncio.create_task(answer(classify(server, TEAM))) for _ in range(16)]
        await eventually(lambda: in_progress(server, mirrors) == 16)
        error = await failure(classify(server, TEAM))
        assert error.details() == (
            "team has 16 of 18 calls in progress; the rest is for other principals"
        )
        assert trailers(error)["convserve-refusal"] == "overloaded"
        modest = asyncio.create_task(answer(classify(server, OTHER)))
        await eventually(lambda: in_progress(server, mirrors) == 17)
        for mirror in mirrors.made:
            mirror.release()
        await asyncio.gather(*flood, modest)


async def test_a_reload_of_the_file_changes_quotas_at_once(tmp_path: Path) -> None:
    async with limited(tmp_path, "images_per_s = 0.01\nburst = 1") as server:
        await classify(server, TEAM)
        error = await failure(classify(server, TEAM))
        assert trailers(error)["convserve-refusal"] == "quota"
        text = server.auth_path.read_text()
        server.auth_path.write_text(text.replace("images_per_s = 0.01\nburst = 1", ""))

        async def is_answered() -> bool:
            try:
                await classify(server, TEAM)
            except grpc.aio.AioRpcError:
                return False
            return True

        while not await is_answered():
            await asyncio.sleep(0.01)


async def test_metrics_by_principal_count_what_each_one_used(tmp_path: Path) -> None:
    async with limited(tmp_path, "images_per_s = 0.01\nburst = 5") as server:
        await classify(server, TEAM, images=3)
        await classify(server, OTHER, images=2)
        for _ in range(2):
            await failure(classify(server, TEAM, images=3))
        registry = server.served.server.metrics.registry

        def value(name: str, **labels: str) -> float:
            return metric(registry, f"convserve_principal_{name}_total", **labels)

        await eventually(lambda: value("images", principal="other") == 2)
        assert value("images", principal="team") == 3
        assert value("requests", principal="team", code="OK") == 1
        assert value("requests", principal="team", code="RESOURCE_EXHAUSTED") == 2
        assert value("refused", principal="team", reason="quota") == 2
        await eventually(lambda: value("device_seconds", principal="team") > 0)
        text = server.auth_path.read_text()
        server.auth_path.write_text(text.replace("[principals.other]", "[principals.new]"))
        text = server.auth_path.read_text()
        server.auth_path.write_text(text.replace('principal = "other"', 'principal = "new"'))
        label = {"principal": "other"}
        name = "convserve_principal_images_total"
        await eventually(lambda: registry.get_sample_value(name, label) is None)
        assert metric(registry, name, principal="team") == 3


def in_progress(server: Guarded, mirrors: Mirrors) -> int:
    """Images that wait or run. The first batch has one image and is held."""
    queued = sum(server.served.server.registry.queued_rows().values())
    return queued + sum(len(mirror.batches) for mirror in mirrors.made)


async def answer(call: Any) -> Any:
    return await call
