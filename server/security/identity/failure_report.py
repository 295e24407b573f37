"""Counts and logs failures of authentication and authorization."""

from __future__ import annotations

import logging
from collections.abc import Callable

from server.telemetry.limited_log import LimitedLog

log = logging.getLogger(__name__)


class FailureReport:
    """Counts every failure, and logs at most one a second. For the event loop's thread only."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._log = LimitedLog(log)

    def __call__(self, reason: str, host: str) -> None:
        self._count(reason)
        self._log.log(logging.WARNING, "access_denied", {"reason": reason, "peer": host})
