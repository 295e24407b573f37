"""A model that a caller may not see looks like a model that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpc import StatusCode

from server.api.stubs import classify_pb2 as pb
from server.api.stubs import open_inference_pb2 as oip
from tests.security.credentials import (
    TEAM_A,
    bearer,
    token_lines,
)
from tests.security.guarded import (
    HIDDEN,
    MISSING,
    SEEN,
    classify_request,
    guarded,
    infer_json,
    infer_request,
    path_of,
)

UNAUTHENTICATED = StatusCode.UNAUTHENTICATED


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
