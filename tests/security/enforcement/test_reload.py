"""A changed auth file is used at once, also for streams in progress."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from server.api.stubs import open_inference_pb2 as oip
from server.security.identity.tokens import new_token
from tests.security.credentials import (
    TEAM_A,
    TEAM_A_OLD,
    bearer,
    token_lines,
)
from tests.security.guarded import (
    OPEN_INFERENCE,
    SEEN,
    as_metadata,
    classify_request,
    guarded,
    infer_request,
    path_of,
)

OK, DENIED = StatusCode.OK, StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = StatusCode.UNAUTHENTICATED


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_a_changed_file_is_used_without_a_restart(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:

        async def code(token: Any) -> StatusCode:
            return (await one.call(path_of("Classify"), classify_request(), [bearer(token)]))[0]

        assert await code(TEAM_A) == OK
        assert await code(TEAM_A_OLD) == OK
        whole = one.auth_path.read_text()
        one.auth_path.write_text(whole.replace(TEAM_A_OLD.id, "0" * 16))

        async def is_revoked() -> bool:
            return await code(TEAM_A_OLD) == UNAUTHENTICATED

        await until(is_revoked)
        assert await code(TEAM_A) == OK

        gauge = one.served.server.metrics.auth_file_refused
        one.auth_path.write_text("[principals")

        async def is_refused() -> bool:
            return bool(gauge._value.get() == 1)

        await until(is_refused)
        assert await code(TEAM_A) == OK
        one.auth_path.unlink()
        one.auth_path.write_text(whole)

        async def is_back() -> bool:
            return gauge._value.get() == 0 and await code(TEAM_A_OLD) == OK

        await until(is_back)


async def test_streams_of_a_removed_principal_end_and_others_go_on(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:

        async def opened(token: Any) -> Any:
            stream: Any = one.served.channel.stream_stream
            call = stream(OPEN_INFERENCE + "ModelStreamInfer")(
                metadata=as_metadata([bearer(token)])
            )
            await call.write(infer_request().SerializeToString())
            answer = oip.ModelStreamInferResponse.FromString(await call.read())
            assert not answer.error_message
            return call

        removed, kept = await opened(TEAM_A_OLD), await opened(TEAM_A)
        text = one.auth_path.read_text()
        one.auth_path.write_text(text.replace(TEAM_A_OLD.sha256, "0" * 64))
        assert await removed.code() == UNAUTHENTICATED
        await kept.write(infer_request().SerializeToString())
        answer = oip.ModelStreamInferResponse.FromString(await kept.read())
        assert not answer.error_message

        # The same stream loses a model, then its role.
        one.auth_path.write_text(one.auth_path.read_text().replace('["tiny*"]', '["other"]'))
        while not answer.error_message:
            await kept.write(infer_request().SerializeToString())
            answer = oip.ModelStreamInferResponse.FromString(await kept.read())
        assert answer.error_message.startswith("NOT_FOUND: there is no model 'tiny'")
        text = one.auth_path.read_text()
        one.auth_path.write_text(text.replace('["classify"]', '["observe"]'))
        assert await kept.code() == DENIED


async def test_a_stream_ends_when_its_token_expires(tmp_path: Path) -> None:
    token = new_token()
    async with guarded(tmp_path) as one:
        ends = datetime.now(UTC) + timedelta(seconds=5)
        with one.auth_path.open("a") as file:
            file.write(token_lines("team-a", token, ends.isoformat()))

        async def is_known() -> bool:
            answer = await one.call(path_of("Classify"), classify_request(), [bearer(token)])
            return answer[0] == OK

        await until(is_known)
        stream: Any = one.served.channel.stream_stream
        metadata = as_metadata([bearer(token)])
        call = stream(OPEN_INFERENCE + "ModelStreamInfer")(metadata=metadata)
        await call.write(infer_request().SerializeToString())
        assert not oip.ModelStreamInferResponse.FromString(await call.read()).error_message
        assert await call.code() == UNAUTHENTICATED
        assert datetime.now(UTC) >= ends
        assert await call.details() == "authorization: the token has expired"
        assert not await is_known()


async def test_a_watch_of_a_model_ends_for_a_caller_who_lost_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        stream: Any = one.served.channel.unary_stream
        request = HealthCheckRequest(service=SEEN).SerializeToString()
        call = stream("/grpc.health.v1.Health/Watch")(
            request, metadata=as_metadata([bearer(TEAM_A)])
        )
        first = HealthCheckResponse.FromString(await call.read())
        assert first.status == HealthCheckResponse.SERVING
        one.auth_path.write_text(one.auth_path.read_text().replace(TEAM_A.id, "0" * 16))
        second = HealthCheckResponse.FromString(await call.read())
        assert second.status == HealthCheckResponse.SERVICE_UNKNOWN
        call.cancel()
