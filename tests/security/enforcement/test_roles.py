"""A caller may call the methods of its roles, and strangers only the probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha import reflection_pb2
from starlette.routing import Route

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from server.app import composition
from server.app.composition import CLASSIFIER as CLASSIFIER_SERVICE
from server.app.composition import OPEN_INFERENCE as OPEN_INFERENCE_SERVICE
from server.security.permissions import METHOD_ROLES, OPEN_METHODS
from server.security.principal import Role
from tests.security.credentials import (
    OBSERVER,
    OPERATOR,
    TEAM_A,
    bearer,
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
    infer_request,
    path_of,
)

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


def test_every_method_has_a_role_or_is_open() -> None:
    methods = [
        method.name
        for service in (CLASSIFIER_SERVICE, OPEN_INFERENCE_SERVICE)
        for method in service.methods
    ]
    assert len(methods) == len(set(methods)), "roles go by name"
    assert set(methods) <= METHOD_ROLES.keys() | OPEN_METHODS
    assert {*REQUESTS, "ModelStreamInfer", "ServerLive", "ServerReady"} == set(methods)


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
