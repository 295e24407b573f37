"""Context of an RPC in progress, and the work that waits until its response is written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from server.security.caller import Caller
from server.telemetry.tracing import Trace

log = logging.getLogger(__name__)


class DeferredCallbacks:
    """Runs callbacks after the responses of this turn of the event loop are written.

    Metrics are updated this way: callers do not wait for them. (Measured behind a ResNet-50, which
    leaves none of our data in the caches: 40 us a call.) Used on the event loop's thread only.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def __call__(self, callback: Callable[..., None], *arguments: Any) -> None:
        if not self._waiting:  # responses are written in this turn, or at the end of the next one
            self._loop.call_soon(self._loop.call_soon, self._run)
        self._waiting.append((callback, arguments))

    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback, arguments in waiting:
            try:
                callback(*arguments)
            except Exception:
                log.exception("metrics_update_failed")


class CallContext:
    """An RPC in progress, from any protocol: its times, its progress, and its labels in metrics."""

    __slots__ = (
        "after_response",
        "caller",
        "arrived_s",
        "deadline_s",
        "model",
        "request_id",
        "stage",
        "trace",
        "version",
    )

    def __init__(
        self,
        arrived_s: float,
        deadline_s: float,
        after_response: DeferredCallbacks,
        caller: Caller,
        trace: Trace | None = None,
    ) -> None:
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s  # on the server's clock; infinite if the caller set none
        self.model = ""  # empty until the model is known to exist
        self.version = ""
        self.request_id = ""  # set only if an error message in a stream must repeat it
        self.stage = "decode"  # then "queue", then "compute"
        self.trace = trace  # None if this call is not traced
        self.caller = caller
        self.after_response = after_response

    def set_model(self, name: str, version: str) -> None:
        """Labels the call in metrics with a model and version that exist."""
        self.model = name
        self.version = version
