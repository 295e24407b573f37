"""The probes: /healthz and /readyz."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from server.api.http.access import HttpAccess
from server.api.http.client_certificates import has_certificate
from server.api.rpc.health import ServingState
from server.api.visible_models import VisibleModels
from server.execution.devices import Devices
from server.security.permissions import LISTS


class Probes:
    """They are open to everybody, and tell strangers less."""

    def __init__(
        self,
        models: VisibleModels,
        access: HttpAccess,
        state: ServingState,
        devices: Devices,
        requires_certificate: bool,
    ) -> None:
        """With `requires_certificate` a caller without one is a stranger."""
        self._models = models
        self._access = access
        self._state = state
        self._devices = devices
        self._requires_certificate = requires_certificate

    def routes(self) -> list[Route]:
        return [
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
        ]

    async def _healthz(self, request: Request) -> Response:
        """503 if only a restart of the process can help: a device is lost."""
        lost = self._devices.lost_reason
        if lost and not self._may_list(request):
            lost = "a device is lost; restart the server"
        return PlainTextResponse(f"{lost or 'ok'}\n", status_code=503 if lost else 200)

    async def _readyz(self, request: Request) -> Response:
        """200 once loading has finished and some model answers.

        The body has every version that the caller may list.
        """
        is_ready = self._state.is_accepting and self._models.is_ready
        body: dict[str, Any] = {"ready": is_ready, "accepting": self._state.is_accepting}
        if self._may_list(request):
            caller = self._access.caller_or_stranger(request)
            body["models"] = [
                {
                    "name": version.model_name,
                    "version": version.number,
                    "state": version.state.name,
                    "reason": version.reason,
                }
                for version in self._models.versions(caller.principal)
            ]
        return JSONResponse(body, status_code=200 if is_ready else 503)

    def _may_list(self, request: Request) -> bool:
        if self._requires_certificate and not has_certificate(request.scope):
            return False
        caller = self._access.caller_or_stranger(request)
        return not caller.principal.roles.isdisjoint(LISTS)
