"""Both ports of a server with an auth file let in the right callers, and only them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived, StreamReset
from starlette.routing import Route

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from server.app import composition
from server.app.composition import CLASSIFIER as CLASSIFIER_SERVICE
from server.app.composition import OPEN_INFERENCE as OPEN_INFERENCE_SERVICE
from server.security.identity.tokens import new_token
from server.security.permissions import METHOD_ROLES, OPEN_METHODS
from server.security.principal import Role
from tests.security.credentials import (
    OBSERVER,
    OPERATOR,
    RAW_VALUES,
    TEAM_A,
    TEAM_A_OLD,
    WRONG_HEADERS,
    bearer,
    token_lines,
)
from tests.security.guarded import (
    CLASSIFIER,
    HIDDEN,
    MISSING,
    OPEN_INFERENCE,
    SEEN,
    as_metadata,
    classify_request,
    guarded,
    infer_json,
    infer_request,
)
from tests.support.http2_peers import DATA, ECHO, END_HEADERS, END_STREAM, HELLO, Raw, frame, plain
from tests.support.http2_peers import HEADERS as HEADERS_FRAME
from tests.support.http2_peers import headers as header_block

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
INFER = f"/v2/models/{SEEN}/infer"
OK, DENIED = StatusCode.OK, StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = StatusCode.UNAUTHENTICATED

# One request of each method, and whether it succeeds for a caller with the role.
REQUESTS: dict[str, tuple[Message, bool]] = {
    "Classify": (classify_request(), True),
    "ListModels": (pb.ListModelsRequest(), True),
    "GetModel": (pb.GetModelRequest(model=SEEN), True),
    "ServerMetadata": (oip.ServerMetadataRequest(), True),
    "ModelReady": (oip.ModelReadyRequest(name=SEEN), True),
    "ModelMetadata": (oip.ModelMetadataRequest(name=SEEN), True),
    "ModelConfig": (oip.ModelConfigRequest(name=SEEN), True),
    "ModelInfer": (infer_request(), True),
    "ModelStatistics": (oip.ModelStatisticsRequest(), True),
    "RepositoryIndex": (oip.RepositoryIndexRequest(), True),
    "RepositoryModelLoad": (oip.RepositoryModelLoadRequest(model_name=SEEN), True),
    "RepositoryModelUnload": (oip.RepositoryModelUnloadRequest(model_name=HIDDEN), True),
    "SystemSharedMemoryStatus": (oip.SystemSharedMemoryStatusRequest(), True),
    "SystemSharedMemoryRegister": (oip.SystemSharedMemoryRegisterRequest(name="a"), False),
    "SystemSharedMemoryUnregister": (oip.SystemSharedMemoryUnregisterRequest(name="a"), True),
}

HOLDERS = {
    "classify": (TEAM_A, {Role.CLASSIFY}),
    "observe": (OBSERVER, {Role.OBSERVE}),
    "admin": (OPERATOR, {Role.ADMIN, Role.OBSERVE}),
}


def path_of(method: str) -> str:
    return (CLASSIFIER if method in ("Classify", "ListModels", "GetModel") else OPEN_INFERENCE) + (
        method
    )


def test_every_method_has_a_role_or_is_open() -> None:
    methods = [
        method.name
        for service in (CLASSIFIER_SERVICE, OPEN_INFERENCE_SERVICE)
        for method in service.methods
    ]
    assert len(methods) == len(set(methods)), "roles go by name"
    assert set(methods) <= METHOD_ROLES.keys() | OPEN_METHODS
    assert {*REQUESTS, "ModelStreamInfer", "ServerLive", "ServerReady"} == set(methods)


async def test_wrong_credentials_are_refused_over_grpc(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        for name, headers in WRONG_HEADERS.items():
            code, details, _ = await one.call(path_of("Classify"), classify_request(), headers)
            assert code == UNAUTHENTICATED, name
            for secret in (TEAM_A.text[:30], "team-a", SEEN, HIDDEN):
                assert secret not in details, name
            code, _, _ = await one.call(path_of("Classify"), classify_request(), [bearer(TEAM_A)])
            assert code == OK, name


@pytest.mark.parametrize("name", RAW_VALUES)
async def test_bytes_that_no_client_library_sends_are_refused(tmp_path: Path, name: str) -> None:
    async with guarded(tmp_path) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.served.server.port)
        h2 = H2Connection(H2Configuration(validate_outbound_headers=False, header_encoding=False))
        h2.initiate_connection()
        fields = [(key, path_of("Classify") if key == ":path" else value) for key, value in ECHO]
        h2.send_headers(1, [*fields, ("authorization", RAW_VALUES[name])])
        writer.write(h2.data_to_send())
        answered = False
        while not answered:
            data = await reader.read(1 << 16)
            assert data, "the connection was closed"
            for event in h2.receive_data(data):
                if isinstance(event, ResponseReceived):
                    assert (b"grpc-status", b"16") in event.headers
                    answered = True
                answered = answered or isinstance(event, StreamReset)
        writer.close()


async def test_wrong_credentials_are_refused_over_http(tmp_path: Path) -> None:
    raw = {name: [("authorization", value)] for name, value in RAW_VALUES.items()}
    async with guarded(tmp_path) as one:
        for name, headers in (WRONG_HEADERS | raw).items():
            answer = await one.rest("POST", INFER, headers, json=infer_json())
            assert answer.status_code == 401, name
            challenge = 'Bearer realm="convserve"'
            if any(key == "authorization" for key, _ in headers):
                challenge += ', error="invalid_token"'
            assert answer.headers["www-authenticate"] == challenge
            assert answer.json()["code"] == "UNAUTHENTICATED"
            for secret in (TEAM_A.text[:30], "team-a", SEEN, HIDDEN):
                assert secret not in answer.text, name
        answer = await one.rest("POST", INFER, [bearer(TEAM_A)], json=infer_json())
        assert answer.status_code == 200
        assert one.count("missing") >= 1
        assert one.count("unknown_token") >= 1
        assert one.count("expired") >= 1


@pytest.mark.parametrize("holder", HOLDERS)
async def test_a_role_allows_its_methods_only(tmp_path: Path, holder: str) -> None:
    token, roles = HOLDERS[holder]
    async with guarded(tmp_path, allow_shared_memory=True) as one:
        for method, (request, succeeds) in REQUESTS.items():
            code, details, _ = await one.call(path_of(method), request, [bearer(token)])
            if roles.isdisjoint(METHOD_ROLES[method]):
                assert code == DENIED, method
                needed = " or ".join(sorted(METHOD_ROLES[method]))
                assert details == (
                    f"{method} needs the role {needed}, which this caller does not have"
                )
            else:
                assert (code == OK) is succeeds, (method, details)
                assert code not in (DENIED, UNAUTHENTICATED)


async def test_the_routes_of_rest_need_the_roles_of_their_methods(tmp_path: Path) -> None:
    routes = {
        "Classify": ("POST", f"/v1/models/{SEEN}:classify"),
        "ModelInfer": ("POST", INFER),
        "ServerMetadata": ("GET", "/v2"),
        "ModelMetadata": ("GET", f"/v2/models/{SEEN}"),
        "ModelConfig": ("GET", f"/v2/models/{SEEN}/config"),
        "ModelReady": ("GET", f"/v2/models/{SEEN}/ready"),
        "ModelStatistics": ("GET", "/v2/models/stats"),
        "RepositoryIndex": ("POST", "/v2/repository/index"),
        "RepositoryModelLoad": ("POST", f"/v2/repository/models/{SEEN}/load"),
        "RepositoryModelUnload": ("POST", f"/v2/repository/models/{HIDDEN}/unload"),
        "SystemSharedMemoryStatus": ("GET", "/v2/systemsharedmemory/status"),
        "SystemSharedMemoryRegister": ("POST", "/v2/systemsharedmemory/region/a/register"),
        "SystemSharedMemoryUnregister": ("POST", "/v2/systemsharedmemory/unregister"),
        "metrics": ("GET", "/metrics"),
    }
    async with guarded(tmp_path, allow_shared_memory=True) as one:
        for method, (verb, path) in routes.items():
            assert (await one.rest(verb, path)).status_code == 401, path
            for token, roles in HOLDERS.values():
                answer = await one.rest(verb, path, [bearer(token)])
                allowed = not roles.isdisjoint(METHOD_ROLES[method])
                assert (answer.status_code not in (401, 403)) is allowed, (path, answer.text)
                if not allowed:
                    assert answer.json()["code"] == "PERMISSION_DENIED"


async def test_strangers_may_call_nothing_but_the_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walks all routes, so that a new one can't be forgotten."""
    made: list[Route] = []
    original = composition.rest_routes

    def remember(*arguments: Any) -> list[Route]:
        made.extend(original(*arguments))
        return made

    monkeypatch.setattr(composition, "rest_routes", remember)
    async with guarded(tmp_path, allow_shared_memory=True) as one:
        assert len(made) >= 20
        statuses = {}
        for route in made:
            path = route.path.replace("{name}", SEEN).replace("{version}", "1")
            verb = "POST" if "POST" in (route.methods or ()) else "GET"
            statuses[path] = (await one.rest(verb, path)).status_code
        opened = {path for path, status in statuses.items() if status != 401}
        assert opened == {"/v2/health/live", "/v2/health/ready"}
        for path in ("/healthz", "/readyz"):
            answer = await one.rest("GET", path)
            assert answer.status_code == 200
            assert SEEN not in answer.text
            assert HIDDEN not in answer.text
        shown = (await one.rest("GET", "/readyz", [bearer(OBSERVER)])).json()
        assert [model["name"] for model in shown["models"]] == [HIDDEN, SEEN]
        for path in ("/", "/v2/", "/v3", "/metrics/", "/docs", "/openapi.json"):
            answer = await one.rest("GET", path)
            assert answer.status_code in (307, 401, 404), path
            assert SEEN not in answer.text


async def test_health_stays_open_but_names_no_model_to_strangers(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:

        async def health(name: str, *headers: Any) -> StatusCode:
            request = HealthCheckRequest(service=name)
            return (await one.call(HEALTH_CHECK, request, headers))[0]

        for name in ("", "convserve.v1.Classifier", "inference.GRPCInferenceService"):
            assert await health(name) == OK
            assert await health(name, ("authorization", b"Bearer wrong")) == OK
        for name in (SEEN, HIDDEN, MISSING):
            assert await health(name) == StatusCode.NOT_FOUND
        assert await health(SEEN, bearer(TEAM_A)) == OK
        assert await health(HIDDEN, bearer(TEAM_A)) == StatusCode.NOT_FOUND
        assert await health(HIDDEN, bearer(OBSERVER)) == OK
        for method in ("ServerLive", "ServerReady"):
            request = getattr(oip, f"{method}Request")()
            assert (await one.call(OPEN_INFERENCE + method, request))[0] == OK
        # A probe is no failure; a wrong token is one everywhere.
        assert one.count("missing") == 0
        assert one.count("malformed") >= 1


async def test_reflection_and_unknown_methods_need_a_credential(tmp_path: Path) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with guarded(tmp_path) as one:

        async def reflect(*headers: Any) -> StatusCode:
            stream: Any = one.served.channel.stream_stream
            call = stream(path)(metadata=as_metadata(headers), timeout=20)
            if headers:  # grpcio reports a write to a refused call as INTERNAL
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                await call.write(request.SerializeToString())
                await call.done_writing()
                await call.read()
            code: StatusCode = await call.code()
            return code

        assert await reflect() == UNAUTHENTICATED
        assert await reflect(bearer(TEAM_A)) == OK
        unknown = f"{CLASSIFIER}Nothing"
        assert (await one.call(unknown, pb.ListModelsRequest()))[0] == UNAUTHENTICATED
        code, _, _ = await one.call(unknown, pb.ListModelsRequest(), [bearer(TEAM_A)])
        assert code == StatusCode.UNIMPLEMENTED


# --- models that the caller may not see ------------------------------------------------------


async def test_a_hidden_model_looks_like_a_missing_one(tmp_path: Path) -> None:
    requests: dict[str, Any] = {
        "Classify": classify_request,
        "GetModel": lambda model: pb.GetModelRequest(model=model),
        "ModelInfer": infer_request,
        "ModelMetadata": lambda model: oip.ModelMetadataRequest(name=model),
        "ModelConfig": lambda model: oip.ModelConfigRequest(name=model),
        "ModelReady": lambda model: oip.ModelReadyRequest(name=model),
    }
    async with guarded(tmp_path) as one:
        for method, make in requests.items():
            answers = []
            for model in (HIDDEN, MISSING):
                code, details, data = await one.call(path_of(method), make(model), [bearer(TEAM_A)])
                answers.append((code, details.replace(model, "MODEL"), data))
                if method != "ModelReady":
                    assert code == StatusCode.NOT_FOUND, (method, details)
                    assert details == f"there is no model {model!r}; known models: {SEEN}"
            assert answers[0] == answers[1], method


async def test_a_hidden_model_looks_like_a_missing_one_over_http(tmp_path: Path) -> None:
    paths = (
        ("POST", "/v1/models/{}:classify"),
        ("POST", "/v1/models/{}/versions/1:classify"),
        ("POST", "/v2/models/{}/infer"),
        ("POST", "/v2/models/{}/versions/1/infer"),
        ("POST", "/v2/models/{}/versions/9/infer"),
        ("POST", "/v2/models/{}/versions/stable/infer"),
        ("GET", "/v2/models/{}"),
        ("GET", "/v2/models/{}/config"),
        ("GET", "/v2/models/{}/ready"),
        ("GET", "/v2/models/{}/versions/1/ready"),
    )
    async with guarded(tmp_path) as one:
        for verb, path in paths:
            body = {"json": infer_json()} if path.endswith("infer") else {}
            answers = []
            for model in (HIDDEN, MISSING):
                answer = await one.rest(verb, path.format(model), [bearer(TEAM_A)], **body)
                answers.append((answer.status_code, answer.text.replace(model, "MODEL")))
            assert answers[0] == answers[1], path
            assert answers[0][0] in (404, 503)


async def test_lists_and_statistics_show_the_visible_models_only(tmp_path: Path) -> None:
    text = """
        [principals.team-b]
        roles = ["classify", "observe", "admin"]
        models = ["tiny"]
    """
    async with guarded(tmp_path, text + token_lines("team-b", TEAM_A)) as one:
        given = [bearer(TEAM_A)]
        _, _, data = await one.call(path_of("ListModels"), pb.ListModelsRequest(), given)
        assert [model.name for model in pb.ListModelsResponse.FromString(data).models] == [SEEN]
        _, _, data = await one.call(path_of("RepositoryIndex"), oip.RepositoryIndexRequest(), given)
        assert [model.name for model in oip.RepositoryIndexResponse.FromString(data).models] == [
            SEEN
        ]
        for path in ("/v2/models/stats", "/readyz"):
            answer = await one.rest("GET", path, given)
            assert SEEN in answer.text
            assert HIDDEN not in answer.text
        answer = await one.rest("POST", "/v2/repository/index", given)
        assert HIDDEN not in answer.text
        answer = await one.rest("GET", "/metrics", given)
        assert answer.status_code == 403
        assert 'they need the role observe with models = ["*"]' in answer.json()["detail"]
        errors = []
        for model in (HIDDEN, MISSING):
            for action in ("load", "unload"):
                answer = await one.rest("POST", f"/v2/repository/models/{model}/{action}", given)
                errors.append(answer.text.replace(model, "MODEL"))
        assert len(set(errors)) == 1
        assert (await one.rest("GET", f"/v2/models/{SEEN}/ready", given)).status_code == 200


async def test_an_empty_name_lists_only_visible_models(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        code, details, _ = await one.call(
            path_of("Classify"), classify_request(""), [bearer(TEAM_A)]
        )
        assert code == StatusCode.INVALID_ARGUMENT
        assert details == f"model: is empty; known models: {SEEN}"


# --- before the body --------------------------------------------------------------------------


async def answer_to_head(port: int, head: str) -> str:
    """The start of the response to a request whose body never comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.replace("\n", "\r\n").encode())
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "more",
    ["Content-Length: 1000000000", "Transfer-Encoding: chunked", "Content-Encoding: gzip"],
)
async def test_http_refuses_before_the_body_comes(tmp_path: Path, more: str) -> None:
    if "Length" not in more and "chunked" not in more:
        more += "\nContent-Length: 100"
    async with guarded(tmp_path) as one:
        head = f"POST {INFER} HTTP/1.1\nHost: x\n{more}\n\n"
        answer = await answer_to_head(one.served.server.http_port, head)
        assert answer.startswith("HTTP/1.1 401 ")


async def test_a_client_that_asks_first_is_refused_without_a_continue(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        head = (
            f"POST {INFER} HTTP/1.1\nHost: x\nContent-Length: 1000\nExpect: 100-continue\n"
            "Authorization: Bearer wrong\n\n"
        )
        answer = await answer_to_head(one.served.server.http_port, head)
        assert answer.startswith("HTTP/1.1 401 ")
        assert "connection: close" in answer.lower()


async def test_grpc_refuses_before_the_body_comes(tmp_path: Path) -> None:
    async with guarded(tmp_path) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.served.server.port)
        connection = Raw(reader, writer)
        block = header_block(ECHO, path=path_of("Classify"))
        connection.send(HELLO, frame(HEADERS_FRAME, END_HEADERS, 1, block))
        flags, fields = await connection.until(HEADERS_FRAME, 1)
        assert flags & END_STREAM
        assert plain([(b"grpc-status", b"16")]) in fields
        # The body that comes nevertheless is not kept, and the connection lives on.
        body = bytes(16_000)
        connection.send(frame(DATA, 0, 1, body), frame(DATA, 0, 1, body))
        await connection.alive()
        writer.close()
        assert one.count("missing") == 1


# --- changes of the file -----------------------------------------------------------------------


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


async def test_watches_of_strangers_leave_room_for_calls(tmp_path: Path) -> None:
    async with guarded(tmp_path, max_calls=18) as one:
        stream: Any = one.served.channel.unary_stream
        watches = [stream("/grpc.health.v1.Health/Watch")(b"", timeout=20) for _ in range(40)]
        assert all([await watch.read() for watch in watches[:16]])
        assert {await watch.code() for watch in watches[16:]} == {StatusCode.RESOURCE_EXHAUSTED}
        for _ in range(20):
            code, details, _ = await one.call(
                path_of("Classify"), classify_request(), [bearer(TEAM_A)]
            )
            assert code == OK, details
        for watch in watches:
            watch.cancel()


# --- the limit of wrong credentials --------------------------------------------------------------


async def test_an_address_with_many_wrong_credentials_keeps_the_right_ones(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path, max_auth_failures_per_min=5) as one:
        right, wrong = [bearer(TEAM_A)], [("authorization", b"Bearer wrong")]
        assert (await one.rest("POST", INFER, right, json=infer_json())).status_code == 200
        for _ in range(5):
            answer = await one.rest("POST", INFER, wrong, json=infer_json())
            assert "try again" not in answer.text
        answer = await one.rest("POST", INFER, wrong, json=infer_json())
        assert answer.status_code == 401
        assert "too many wrong credentials came from this address; try again in" in answer.text
        code, details, _ = await one.call(
            path_of("ListModels"), pb.ListModelsRequest(), [bearer(OBSERVER)]
        )
        assert code == UNAUTHENTICATED
        assert "too many wrong credentials" in details
        assert (await one.rest("POST", INFER, right, json=infer_json())).status_code == 200
        assert (await one.call(path_of("Classify"), classify_request(), right))[0] == OK
        assert one.count("limited") == 2
