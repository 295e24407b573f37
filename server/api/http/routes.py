"""REST: the Open Inference Protocol under /v2, and under /v1 one image file, as curl sends it.

Every route is counted as the gRPC method of the same name, and refuses for the same reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.api.content import ImageFile, ImageList, OneImage
from server.api.context import CallContext
from server.api.http.calls import HttpCalls
from server.api.http.form import is_form, parse_form
from server.api.http.problem import JsonResponse
from server.api.inference import (
    DEFAULT_TOP_K,
    Inference,
    InferenceRequest,
    InferenceResponse,
    best_classes,
)
from server.api.status import HTTP_STATUS, STATUS
from server.api.turns import WorkTurns
from server.api.v2.infer import TensorInference
from server.api.v2.json_codec import MAX_JSON_BYTES, decode_json, decode_request, encode_response
from server.api.v2.metadata import Metadata
from server.api.v2.model_control import ModelControl
from server.api.v2.shared_memory import RegionControl
from server.api.v2.versions import MAX_QUOTED, is_whole_number, parse_version
from server.errors import InvalidInput, ModelNotReady

HEADER_LENGTH = "Inference-Header-Content-Length"
SMALL_BODY_BYTES = 4096  # for a body that only holds a few names

# Larger bodies to parse wait for their turn of the event loop.
LIGHT_BYTES = 64 << 10
JSON_BYTE_S = FORM_BYTE_S = 2e-9  # to parse
MAX_U32 = (1 << 32) - 1
MAX_QUERY_BYTES = 2048
QUERY = ("top_k", "priority", "request_id")  # parameters of :classify

Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class IndexBody(msgspec.Struct):
    """The body of /v2/repository/index."""

    ready: bool | None = None


class RegionBody(msgspec.Struct):
    """The body of /v2/systemsharedmemory/region/NAME/register."""

    key: str
    byte_size: Size
    offset: Size | None = None


class ControlBody(msgspec.Struct):
    """The body of /v2/repository/models/NAME/load and /unload."""

    parameters: dict[str, str | bool | int | None] | None = None


class RegionStatus(msgspec.Struct):
    """A region in the response of /v2/systemsharedmemory/status."""

    name: str
    key: str
    offset: int
    byte_size: int


# null means absent.
_CONTROL = msgspec.json.Decoder(ControlBody | None)
_REGION = msgspec.json.Decoder(RegionBody)
_INDEX = msgspec.json.Decoder(IndexBody | None)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes of a body; larger ones are refused before they are read."""

    image: int
    infer: int

    def of_infer(self, request: Request) -> int:
        """The limit of a ModelInfer request: one without binary data is JSON."""
        has_binary = HEADER_LENGTH in request.headers
        return self.infer if has_binary else min(self.infer, MAX_JSON_BYTES)


class Rest:
    """The routes under /v1 and /v2. `regions` is None if shared memory is not served."""

    def __init__(
        self,
        calls: HttpCalls,
        inference: Inference,
        tensors: TensorInference,
        metadata: Metadata,
        control: ModelControl,
        regions: RegionControl | None,
        *,
        max_fields: int,
        limits: BodyLimits,
        turns: WorkTurns,
    ) -> None:
        self._calls = calls
        self._inference = inference
        self._tensors = tensors
        self._metadata = metadata
        self._control = control
        self._regions = regions
        self._max_fields = max_fields
        self._limits = limits
        self._turns = turns

    def routes(self) -> list[Route]:
        get, post, small = self._calls.get, self._calls.post, SMALL_BODY_BYTES
        repository = "/v2/repository/models/{name}"
        routes = [
            get("/v2/health/live", "ServerLive", self._live),
            get("/v2/health/ready", "ServerReady", self._ready),
            get("/v2", "ServerMetadata", self._server),
            get("/v2/models/stats", "ModelStatistics", self._statistics),
            post("/v2/repository/index", "RepositoryIndex", self._index, small),
            post(f"{repository}/load", "RepositoryModelLoad", self._load, small),
            post(f"{repository}/unload", "RepositoryModelUnload", self._unload, small),
        ]
        for version in ("", "/versions/{version}"):
            model = f"/v2/models/{{name}}{version}"
            classify = f"/v1/models/{{name}}{version}:classify"
            routes += [
                get(model, "ModelMetadata", self._model),
                get(f"{model}/ready", "ModelReady", self._model_ready),
                get(f"{model}/config", "ModelConfig", self._config),
                get(f"{model}/stats", "ModelStatistics", self._statistics),
                post(f"{model}/infer", "ModelInfer", self._infer, self._limits.of_infer),
                post(classify, "Classify", self._classify, self._limits.image),
            ]
        if self._regions is not None:
            routes += _SharedMemoryRoutes(self._calls, self._regions).routes()
        return routes

    async def _live(self, request: Request, body: bytes, context: CallContext) -> Response:
        return JsonResponse({"live": True})

    async def _ready(self, request: Request, body: bytes, context: CallContext) -> Response:
        is_ready = self._metadata.is_ready()
        return JsonResponse({"ready": is_ready}, _ready_status(is_ready))

    async def _server(self, request: Request, body: bytes, context: CallContext) -> Response:
        return JsonResponse(self._metadata.server())

    async def _model(self, request: Request, body: bytes, context: CallContext) -> Response:
        return JsonResponse(self._metadata.model(*_name_and_version(request), context))

    async def _model_ready(self, request: Request, body: bytes, context: CallContext) -> Response:
        name, version = _name_and_version(request)
        is_ready = self._metadata.is_model_ready(name, version, context)
        return JsonResponse({"name": name, "ready": is_ready}, _ready_status(is_ready))

    async def _config(self, request: Request, body: bytes, context: CallContext) -> Response:
        return JsonResponse(self._metadata.config(*_name_and_version(request), context))

    async def _statistics(self, request: Request, body: bytes, context: CallContext) -> Response:
        found = self._metadata.statistics(*_name_and_version(request), context)
        return JsonResponse({"model_stats": found})

    async def _index(self, request: Request, body: bytes, context: CallContext) -> Response:
        given: IndexBody | None = decode_json(_INDEX, body) if body else None
        only_ready = given is not None and given.ready is True
        return JsonResponse(self._metadata.index("", context, only_ready=only_ready))

    async def _load(self, request: Request, body: bytes, context: CallContext) -> Response:
        name = request.path_params["name"]
        await self._control.load(context, "", name, _control_parameters(body))
        return JsonResponse({})

    async def _unload(self, request: Request, body: bytes, context: CallContext) -> Response:
        name = request.path_params["name"]
        await self._control.unload(context, "", name, _control_parameters(body))
        return JsonResponse({})

    async def _infer(self, request: Request, body: bytes, context: CallContext) -> Response:
        given = _whole_number(HEADER_LENGTH, request.headers.get(HEADER_LENGTH), len(body))
        json_bytes = len(body) if given is None else given
        name, version = _name_and_version(request)
        if json_bytes > LIGHT_BYTES:
            await self._turns.wait(json_bytes * JSON_BYTE_S)
        decoded = decode_request(name, version, body, json_bytes, self._max_fields)
        response = await self._tensors.infer(decoded.request, context)
        self._tensors.complete(response, context)
        data, json_bytes = encode_response(response, decoded.binary_outputs)
        if json_bytes == len(data):
            return Response(data, media_type="application/json")
        headers = {HEADER_LENGTH: str(json_bytes)}
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def _classify(self, request: Request, body: bytes, context: CallContext) -> Response:
        if len(request.scope["query_string"]) > MAX_QUERY_BYTES:
            raise InvalidInput("query", f"has more than {MAX_QUERY_BYTES:,} bytes")
        query: dict[str, str] = dict(request.query_params)
        image: OneImage = ImageFile(body, "body")
        if is_form(request):
            if len(body) > LIGHT_BYTES:
                await self._turns.wait(len(body) * FORM_BYTE_S)
            form = parse_form(body, request.headers["content-type"])
            image, query = form.image, form.texts | query
        if unknown := set(query) - set(QUERY):
            raise InvalidInput(
                min(unknown)[:MAX_QUOTED],
                f"is not a parameter; {', '.join(QUERY)} are allowed",
            )
        name, version = _name_and_version(request)
        choice = parse_version("version", version)
        top_k = _whole_number("top_k", query.get("top_k"), MAX_U32) or 0
        response = await self._inference.infer(
            InferenceRequest(
                name,
                choice.number,
                choice.label,
                query.get("request_id", ""),
                ImageList([image]),
                context.deadline_s,
                _whole_number("priority", query.get("priority"), MAX_U32) or 0,
                top_k,
            ),
            context,
        )
        total_s = self._inference.complete(response, context)
        return JsonResponse(_classification(response, top_k, total_s))


class _SharedMemoryRoutes:
    """The routes under /v2/systemsharedmemory."""

    def __init__(self, calls: HttpCalls, regions: RegionControl) -> None:
        self._calls = calls
        self._regions = regions

    def routes(self) -> list[Route]:
        get, post, small = self._calls.get, self._calls.post, SMALL_BODY_BYTES
        root, name = "/v2/systemsharedmemory", "/region/{name}"
        register = "SystemSharedMemoryRegister"
        status, unregister = "SystemSharedMemoryStatus", "SystemSharedMemoryUnregister"
        return [
            post(f"{root}{name}/register", register, self._register, small),
            get(f"{root}/status", status, self._status),
            get(f"{root}{name}/status", status, self._status),
            post(f"{root}/unregister", unregister, self._unregister, small),
            post(f"{root}{name}/unregister", unregister, self._unregister, small),
        ]

    async def _status(self, request: Request, body: bytes, context: CallContext) -> Response:
        found = self._regions.status(request.path_params.get("name", ""))
        return JsonResponse(
            [RegionStatus(one.name, one.key, one.offset, one.byte_size) for one in found]
        )

    async def _register(self, request: Request, body: bytes, context: CallContext) -> Response:
        given: RegionBody = decode_json(_REGION, body)
        name = request.path_params["name"]
        self._regions.register(context, name, given.key, given.offset or 0, given.byte_size)
        return JsonResponse({})

    async def _unregister(self, request: Request, body: bytes, context: CallContext) -> Response:
        self._regions.unregister(context, request.path_params.get("name", ""))
        return JsonResponse({})


def _name_and_version(request: Request) -> tuple[str, str]:
    """Model and version of a path; empty if the path has none."""
    path = request.path_params
    return path.get("name", ""), path.get("version", "")


def _classification(response: InferenceResponse, top_k: int, total_s: float) -> dict[str, Any]:
    model = response.model
    (row,) = best_classes(response.outputs, top_k or min(DEFAULT_TOP_K, model.manifest.top_k))
    return {
        "model": model.name,
        "version": model.manifest.version,
        "trained": model.manifest.weights.trained,
        "classes": [
            {"index": index, "label": model.labels[index], "probability": score}
            for index, score in row
        ],
        "timing": {
            "decode_ms": response.decode_s * 1e3,
            "queue_ms": response.queue_s * 1e3,
            "compute_ms": response.compute_s * 1e3,
            "total_ms": total_s * 1e3,
            "batch_rows": response.batch_rows,
        },
        "request_id": response.request_id,
    }


def _ready_status(is_ready: bool) -> int:
    return 200 if is_ready else HTTP_STATUS[STATUS[ModelNotReady]]


def _whole_number(field: str, text: str | None, most: int) -> int | None:
    """A whole number from 0; None if it is not given. Raises InvalidInput."""
    if text is None:
        return None
    if not is_whole_number(text):
        raise InvalidInput(field, f"is {text[:MAX_QUOTED]!r}; a whole number is needed")
    if int(text) > most:
        raise InvalidInput(field, f"is {text}; 0 to {most} is allowed")
    return int(text)


def _control_parameters(body: bytes) -> list[str]:
    """The names of the parameters in a body. Their values have no effect."""
    given: ControlBody | None = decode_json(_CONTROL, body) if body else None
    parameters = given.parameters if given is not None else None
    return [name for name, value in (parameters or {}).items() if value is not None]
