"""Counts and logs failures of authentication and authorization."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LOG_PERIOD_S = 1.0


class FailureReport:
    """Counts every failure, and logs one a second with the number of those in between.

    Used on the event loop's thread only.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._next_log_s = 0.0
        self._not_logged = 0

    def __call__(self, reason: str, host: str) -> None:
        self._count(reason)
        now_s = time.monotonic()
        if now_s < self._next_log_s:
            self._not_logged += 1
            return
        log.warning(
            "access_denied",
            extra={"reason": reason, "peer": host, "left_out": self._not_logged},
        )
        self._next_log_s, self._not_logged = now_s + LOG_PERIOD_S, 0
