"""HTTP responses: JSON, and errors as problem details (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import msgspec
from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.status import HTTP_STATUS

PROBLEM = "application/problem+json"

NOTHING: Mapping[str, Any] = MappingProxyType({})


class JsonResponse(Response):
    """JSON of anything that msgspec can encode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def problem(
    code: StatusCode,
    detail: str,
    members: Mapping[str, Any] = NOTHING,
    headers: Mapping[str, str] = NOTHING,
) -> Response:
    """The problem for a gRPC status; `members` are added to its JSON."""
    return _problem(HTTP_STATUS[code], detail, {"code": code.name, **members}, headers)


def http_problem(error: HTTPException) -> Response:
    """The problem for an error of HTTP itself: no such path, wrong method, body too large."""
    return _problem(error.status_code, error.detail, NOTHING, dict(error.headers or {}))


def _problem(
    status: int, detail: str, members: Mapping[str, Any], headers: Mapping[str, str]
) -> Response:
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": int(status), "detail": detail}
    # Clients of the Open Inference Protocol read `error`.
    content = {**body, "error": detail, **members}
    return JsonResponse(content, status, dict(headers), media_type=PROBLEM)
