"""The same calls over HTTP: the Open Inference Protocol's REST, and an image straight from curl.

Each is answered by the coroutine that answers it over gRPC, counted under the same method, and
refused for the same reasons: as a problem (RFC 9457) with the status that `HTTP_STATUS` gives for
gRPC's. A caller sets its deadline by the header `Grpc-Timeout`, whose form gRPC defines ("500m" is
half a second) and which gateways from HTTP to gRPC read as well; HTTP has no header of its own for
it. A caller that hangs up, or whose deadline passes, costs no computation.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from grpc import StatusCode
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from server.api.classify import Classifier
from server.api.handlers import (
    STATUS,
    Call,
    InFlightLimits,
    MethodMetrics,
    clipped,
    told,
)
from server.api.stubs import classify_pb2, open_inference_pb2
from server.api.v2.json_codec import (
    decoded,
    infer_request,
    infer_response,
    plain,
)
from server.api.v2.service import (
    NAME_LIMIT,
    VERSION_DIGITS,
    OpenInference,
    version_or_label,
)
from server.errors import InvalidInput, ModelNotReady, Overloaded, ServingError
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics
from server.transport.compression import (
    WINDOW_BITS,
    DecompressionError,
    TooLargeError,
    inflate,
)
from server.transport.metadata import timeout_s

HTTP_STATUS = {
    StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
PROBLEM = "application/problem+json"

DEADLINE = "Grpc-Timeout"

HEADER_LENGTH = "Inference-Header-Content-Length"
SMALL_BODY_BYTES = 4096  # of a question that needs no more than a few names
BODY_S = 30.0  # for a body to come in, which takes the place of a call meanwhile
TURN_S = 0.2  # between looks at what is still in progress when the server ends
MOST_U32 = (1 << 32) - 1

IDENTITY = "identity"

NOTHING: Mapping[str, Any] = MappingProxyType({})
# Of an answer to who asked whether to send a body ("Expect: 100-continue"), and does not know now
# whether one is still waited for. Others are sending it: to close would take the answer from them.
UNSENT = {"Connection": "close"}

Answering = Callable[[Request, bytes, Call], Coroutine[Any, Any, Response]]


Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Index(msgspec.Struct):
    """The body of /v2/repository/index."""

    ready: bool = False


class Region(msgspec.Struct):
    """The body of /v2/systemsharedmemory/region/NAME/register."""

    key: str
    byte_size: Size
    offset: Size = 0


class Control(msgspec.Struct):
    """The body of /v2/repository/models/NAME/load and /unload; Triton's clients send the latter
    "unload_dependents"."""

    parameters: dict[str, str | bool | int] = {}


_CONTROL = msgspec.json.Decoder(Control)
_REGION = msgspec.json.Decoder(Region)
_INDEX = msgspec.json.Decoder(Index)


class Json(Response):
    """What msgspec makes of anything."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes of a body; larger ones are refused before they are read."""

    image: int
    infer: int


class Rest:
    """The routes under /v1 and /v2. Used on the event loop's thread only."""

    def __init__(
        self,
        classifier: Classifier,
        open_inference: OpenInference,
        metrics: Metrics,
        intake: InFlightLimits,
        limits: BodyLimits,
        *,
        shared_memory: bool = False,
    ) -> None:
        self._classifier = classifier
        self._open_inference = open_inference
        self._metrics = metrics
        self._intake = intake
        self._limits = limits
        self._shared_memory = shared_memory
        self._working: set[asyncio.Task[Response]] = set()
        self._receiving: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._ended = False  # nobody is waited for any more

    def routes(self) -> list[Route]:
        one, all_of = "/v2/models/{name}", ("", "/versions/{version}")
        routes = [
            self._get("/v2/health/live", "ServerLive", self._live),
            self._get("/v2/health/ready", "ServerReady", self._ready),
            self._get("/v2", "ServerMetadata", self._server),
            self._get("/v2/models/stats", "ModelStatistics", self._statistics),
            self._post("/v2/repository/index", "RepositoryIndex", self._index, SMALL_BODY_BYTES),
        ]
        for action, answering in (("Load", self._load), ("Unload", self._unload)):
            path = f"/v2/repository/models/{{name}}/{action.lower()}"
            routes.append(self._post(path, f"RepositoryModel{action}", answering, SMALL_BODY_BYTES))
        for version in all_of:
            model = one + version
            routes += [
                self._get(model, "ModelMetadata", self._metadata),
                self._get(f"{model}/ready", "ModelReady", self._model_ready),
                self._get(f"{model}/config", "ModelConfig", self._config),
                self._get(f"{model}/stats", "ModelStatistics", self._statistics),
                self._post(f"{model}/infer", "ModelInfer", self._infer, self._limits.infer),
                self._post(
                    f"/v1/models/{{name}}{version}:classify",
                    "Classify",
                    self._classify,
                    self._limits.image,
                ),
            ]
        return routes + (self._region_routes() if self._shared_memory else [])

    def _region_routes(self) -> list[Route]:
        root, small = "/v2/systemsharedmemory", SMALL_BODY_BYTES
        register = "SystemSharedMemoryRegister"
        routes = [self._post(f"{root}/region/{{name}}/register", register, self._register, small)]
        for region in ("", "/region/{name}"):
            status, unregister = f"{root}{region}/status", f"{root}{region}/unregister"
            routes += [
                self._get(status, "SystemSharedMemoryStatus", self._regions),
                self._post(unregister, "SystemSharedMemoryUnregister", self._unregister, small),
            ]
        return routes

    async def stop(self, grace_s: float | None) -> None:
        """Takes no new calls; ends when those in progress have, at the latest after the grace.

        None is none, as for a server of grpcio's.
        """
        self._stopping = True
        ends_s = clock() + (grace_s or 0)
        while not self._ended and (left_s := ends_s - clock()) > 0:
            if not (busy := {*self._working, *self._receiving}):
                break
            # What is being received now is worked on next, and stands in the other of the two then.
            await asyncio.wait(busy, timeout=min(left_s, TURN_S))
        self._ended = True
        for task in (*self._working, *self._receiving):
            task.cancel()

    # --- what is asked for without a body

    async def _live(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ServerLiveRequest()
        return Json(plain(await self._open_inference.ServerLive(message, call)))

    async def _ready(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ServerReadyRequest()
        answer = await self._open_inference.ServerReady(message, call)
        return Json(plain(answer), _ready_status(answer.ready))

    async def _server(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ServerMetadataRequest()
        return Json(plain(await self._open_inference.ServerMetadata(message, call)))

    async def _metadata(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ModelMetadataRequest(**request.path_params)
        return Json(plain(await self._open_inference.ModelMetadata(message, call)))

    async def _model_ready(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ModelReadyRequest(**request.path_params)
        answer = await self._open_inference.ModelReady(message, call)
        ready = {"name": message.name, "ready": answer.ready}
        return Json(ready, _ready_status(answer.ready))

    async def _config(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ModelConfigRequest(**request.path_params)
        answer = await self._open_inference.ModelConfig(message, call)
        return Json(plain(answer.config))

    async def _statistics(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.ModelStatisticsRequest(**request.path_params)
        return Json(plain(await self._open_inference.ModelStatistics(message, call)))

    async def _regions(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.SystemSharedMemoryStatusRequest(**request.path_params)
        answer = await self._open_inference.SystemSharedMemoryStatus(message, call)
        return Json([plain(region) for region in answer.regions.values()])

    # --- what has one

    async def _register(self, request: Request, body: bytes, call: Call) -> Response:
        region: Region = decoded(_REGION, body)
        message = open_inference_pb2.SystemSharedMemoryRegisterRequest(
            name=request.path_params["name"],
            key=region.key,
            offset=region.offset,
            byte_size=region.byte_size,
        )
        await self._open_inference.SystemSharedMemoryRegister(message, call)
        return Json({})

    async def _unregister(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.SystemSharedMemoryUnregisterRequest(**request.path_params)
        await self._open_inference.SystemSharedMemoryUnregister(message, call)
        return Json({})

    async def _index(self, request: Request, body: bytes, call: Call) -> Response:
        ready = decoded(_INDEX, body).ready if body else False
        message = open_inference_pb2.RepositoryIndexRequest(ready=ready)
        answer = await self._open_inference.RepositoryIndex(message, call)
        return Json([plain(model) for model in answer.models])

    async def _load(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.RepositoryModelLoadRequest(
            model_name=request.path_params["name"], parameters=_control_parameters(body)
        )
        await self._open_inference.RepositoryModelLoad(message, call)
        return Json({})

    async def _unload(self, request: Request, body: bytes, call: Call) -> Response:
        message = open_inference_pb2.RepositoryModelUnloadRequest(
            model_name=request.path_params["name"], parameters=_control_parameters(body)
        )
        await self._open_inference.RepositoryModelUnload(message, call)
        return Json({})

    async def _infer(self, request: Request, body: bytes, call: Call) -> Response:
        given = _whole(HEADER_LENGTH, request.headers.get(HEADER_LENGTH), len(body))
        header_bytes = len(body) if given is None else given
        name, version = request.path_params["name"], request.path_params.get("version", "")
        fields = self._intake.max_fields
        message, elements, binary = infer_request(name, version, body, header_bytes, fields)
        answer = await self._open_inference.infer(message, call, elements)
        data, header_bytes = infer_response(answer, binary)
        if header_bytes == len(data):
            return Response(data, media_type="application/json")
        headers = {HEADER_LENGTH: str(header_bytes)}
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def _classify(self, request: Request, body: bytes, call: Call) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise InvalidInput("body", "is a form; the file itself is needed, as --data-binary has")
        path, query = request.path_params, request.query_params
        if strange := set(query) - {"top_k", "priority", "request_id"}:
            raise InvalidInput(
                min(strange)[:80], "is no parameter; there are top_k, priority and request_id"
            )
        version, label = version_or_label("version", path.get("version", ""))
        message = classify_pb2.ClassifyRequest(
            model=path["name"],
            version=version,
            label=label,
            images=[classify_pb2.Image(encoded=body)],
            top_k=_whole("top_k", query.get("top_k"), MOST_U32) or 0,
            priority=_whole("priority", query.get("priority"), MOST_U32) or 0,
            request_id=query.get("request_id", ""),
        )
        try:
            answer = await self._classifier.Classify(message, call)
        except InvalidInput as error:  # the one image is the body
            field = "body" if error.field.startswith("images") else error.field
            raise InvalidInput(field, error.description) from None
        return Json(
            {
                "model": answer.model,
                "version": answer.version,
                "trained": answer.trained,
                "classes": [plain(found) for found in answer.results[0].classes],
                "timing": plain(answer.timing),
                "request_id": answer.request_id,
            }
        )

    # --- how all of them are answered

    def _get(self, path: str, method: str, answering: Answering) -> Route:
        """A question that is answered at once, from memory; it holds nothing and is never too
        much."""
        tally = MethodMetrics(method, self._metrics)

        async def endpoint(request: Request) -> Response:
            call = Call(clock(), math.inf, self._intake.after)
            try:
                response = await answering(request, b"", call)
            except Exception as error:
                return self._failed(error, call, tally, method)
            tally.answered(call, clock() - call.arrived_s)
            return response

        return Route(path, endpoint, methods=["GET"], name=method)

    def _post(self, path: str, method: str, answering: Answering, limit: int) -> Route:
        """A question with a body of so many bytes at most."""
        tally = MethodMetrics(method, self._metrics)

        async def endpoint(request: Request) -> Response:
            call = Call(clock(), math.inf, self._intake.after)
            try:
                if self._stopping:
                    raise ModelNotReady("the server is stopping")
                call.deadline_s = call.arrived_s + _timeout(request.headers.get(DEADLINE))
                async with self._body(request, limit, call) as body:
                    response = await self._worked(request, answering(request, body, call), call)
            except TimeoutError:
                tally.given_up(call, late=True)
                return _problem(StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
            except ClientDisconnect:
                tally.given_up(call, late=False)
                return Response()  # nobody reads it
            except Exception as error:
                return self._failed(error, call, tally, method)
            call.after(tally.answered, call, clock() - call.arrived_s)
            return response

        return Route(path, endpoint, methods=["POST"], name=method)

    @asynccontextmanager
    async def _body(self, request: Request, limit: int, call: Call) -> AsyncIterator[bytes]:
        """The body, its bytes counted among those in progress as they come and until the end.

        Raises TimeoutError when the call's deadline passes meanwhile.
        """
        held = 0
        unsent = UNSENT if "expect" in request.headers else None
        try:
            self._intake.take()
            encoding = request.headers.get("content-encoding", IDENTITY).strip().lower()
            if encoding not in (IDENTITY, *WINDOW_BITS):
                understood = ", ".join((IDENTITY, *WINDOW_BITS))
                why = f"Content-Encoding: {encoding[:NAME_LIMIT]!r}; {understood} are understood"
                raise HTTPException(415, why, unsent)
            length = request.headers.get("content-length", "")
            if length.isdecimal() and int(length) > limit:
                raise _too_large(limit, unsent)
            parts = []
            left_s = call.deadline_s - clock()
            task = asyncio.current_task()
            assert task is not None
            self._receiving.add(task)
            try:
                async with asyncio.timeout(min(left_s, BODY_S)):
                    async for part in request.stream():
                        if held + len(part) > limit:
                            raise _too_large(limit)
                        held += len(part)
                        self._intake.hold(len(part))
                        parts.append(part)
            except TimeoutError:
                if left_s > BODY_S:
                    why = f"the body took more than {BODY_S:.0f} s"
                    raise HTTPException(408, why) from None
                raise
            except asyncio.CancelledError:
                if not self._ended:
                    raise
                task.uncancel()
                raise ModelNotReady("the server has stopped") from None
            finally:
                self._receiving.discard(task)
            body = b"".join(parts)
            if encoding != IDENTITY:
                body = await _inflated(body, encoding, limit)
                held += len(body)
                self._intake.hold(len(body))
            yield body
        finally:
            self._intake.leave(held)

    async def _worked(
        self, request: Request, work: Coroutine[Any, Any, Response], call: Call
    ) -> Response:
        """What the work gives; its own errors, TimeoutError at the deadline, ClientDisconnect."""
        if self._ended:
            work.close()
            raise ModelNotReady("the server has stopped")
        working = asyncio.create_task(work)
        gone = asyncio.create_task(_hung_up(request))
        self._working.add(working)
        left_s = None if call.deadline_s == math.inf else max(0.0, call.deadline_s - clock())
        try:
            await asyncio.wait({working, gone}, timeout=left_s, return_when=FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect if gone.done() else TimeoutError
        finally:
            gone.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
            self._working.discard(working)
        if working.cancelled():
            raise ModelNotReady("the server has stopped")
        return working.result()

    def _failed(self, error: Exception, call: Call, tally: MethodMetrics, method: str) -> Response:
        if isinstance(error, ServingError):
            tally.refused(call, error)
            members: dict[str, Any] = {}
            headers: dict[str, str] = {}
            if isinstance(error, InvalidInput):
                members["field"] = clipped(error.field)
            elif isinstance(error, Overloaded):
                members["retry_after_ms"] = math.ceil(error.retry_after_s * 1e3)
                headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
            return _problem(STATUS[type(error)], told(error, method), members, headers)
        if isinstance(error, HTTPException):
            tally.count(call, StatusCode.INVALID_ARGUMENT)
            return http_problem(error)
        tally.broken(call)
        return _problem(StatusCode.INTERNAL, "internal error")


def http_problem(error: HTTPException) -> Response:
    """Of HTTP's own errors: no such path, another method, a body too large."""
    return _problem_of(error.status_code, error.detail, {}, dict(error.headers or {}))


def _problem(
    code: StatusCode,
    detail: str,
    members: Mapping[str, Any] = NOTHING,
    headers: Mapping[str, str] = NOTHING,
) -> Response:
    return _problem_of(HTTP_STATUS[code], detail, {"code": code.name, **members}, headers)


def _problem_of(
    status: int, detail: str, members: Mapping[str, Any], headers: Mapping[str, str]
) -> Response:
    # `error` is where clients of the Open Inference Protocol look.
    title = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": title, "status": int(status), "detail": detail}
    return Json({**body, "error": detail, **members}, status, dict(headers), media_type=PROBLEM)


def _too_large(limit: int, headers: Mapping[str, str] | None = None) -> HTTPException:
    return HTTPException(
        413, f"the body has more than {limit:,} bytes; no more are allowed", headers
    )


async def _inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """Raises InvalidInput, and HTTPException where it is too large. On another thread: a small body
    may become a large one."""
    try:
        return await asyncio.to_thread(inflate, body, encoding, limit)
    except TooLargeError as error:
        raise HTTPException(413, f"the body {error}") from None
    except DecompressionError as error:
        raise InvalidInput("body", str(error)) from None


def _ready_status(ready: bool) -> int:
    return 200 if ready else HTTP_STATUS[StatusCode.UNAVAILABLE]


def _timeout(text: str | None) -> float:
    """Seconds until the deadline, infinite without one. Raises InvalidInput."""
    if text is None:
        return math.inf
    seconds = timeout_s(text)
    if seconds is None:
        raise InvalidInput(
            DEADLINE,
            f"is {text[:NAME_LIMIT]!r}; up to 8 digits and one of H, M, S, m, u, n are needed: "
            "500m is half a second",
        )
    return seconds


def _whole(field: str, text: str | None, most: int) -> int | None:
    """A whole number from 0, None where nothing is given. Raises InvalidInput."""
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= VERSION_DIGITS):
        raise InvalidInput(field, f"is {text[:NAME_LIMIT]!r}; a whole number is needed")
    if int(text) > most:
        raise InvalidInput(field, f"is {text}; 0 to {most} is allowed")
    return int(text)


async def _hung_up(request: Request) -> None:
    """Waits until the caller of a request, whose body has been read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _control_parameters(body: bytes) -> dict[str, open_inference_pb2.ModelRepositoryParameter]:
    """The names that a body gives; of what value is nobody's business, as most are not allowed."""
    given: Control = decoded(_CONTROL, body) if body else Control()
    return {name: open_inference_pb2.ModelRepositoryParameter() for name in given.parameters}
