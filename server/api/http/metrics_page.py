"""/metrics: many readers at once share one page."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from server.api.http.access import HttpAccess, refusal
from server.errors import ServingError
from server.security.permissions import READ_METRICS
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics

INTERVAL_S = 0.1  # between pages: one takes up to 20 ms of the event loop


class MetricsPage:
    """Renders the metrics at most once in INTERVAL_S. Used on the event loop's thread only.

    Readers that come meanwhile wait, and share the next page. So a page is never older than its
    request.
    """

    def __init__(self, metrics: Metrics, access: HttpAccess) -> None:
        self._metrics = metrics
        self._access = access
        self._loop = asyncio.get_running_loop()
        self._next_s = 0.0  # when the next page may be rendered
        self._coming: dict[str, asyncio.Future[Response]] = {}  # pages by their format

    async def get(self, request: Request) -> Response:
        """The endpoint of the route."""
        try:
            self._access.admit(request, READ_METRICS)
        except ServingError as error:
            return refusal(request, error, READ_METRICS)
        accept = request.headers.get("accept", "")
        text_format = self._metrics.format_for(accept)
        page = self._coming.get(text_format)
        if page is None:
            now_s = clock()
            starts_s = max(now_s, self._next_s)
            self._next_s = starts_s + INTERVAL_S
            if starts_s == now_s:
                return self._render(accept)
            page = self._coming[text_format] = self._loop.create_future()
            self._loop.call_later(starts_s - now_s, self._answer, text_format, accept)
        return await asyncio.shield(page)

    def _answer(self, text_format: str, accept: str) -> None:
        page = self._coming.pop(text_format)
        try:
            page.set_result(self._render(accept))
        except Exception as error:
            page.set_exception(error)

    def _render(self, accept: str) -> Response:
        text, content_type = self._metrics.render_for(accept)
        return Response(text, headers={"content-type": content_type})
