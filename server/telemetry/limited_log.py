"""Log lines about clients, at most one a second for each kind."""

from __future__ import annotations

import logging
from typing import Any

from server.telemetry.clock import clock

INTERVAL_S = 1.0


class LimitedLog:
    """Logs each event at most once a second, so that an attack can't fill the disk.

    The next line says how many were left out: `left_out=41`. Not thread-safe.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s: dict[str, float] = {}  # event -> when it may be logged again
        self._left_out: dict[str, int] = {}

    def log(self, level: int, event: str, extra: dict[str, Any]) -> None:
        """`event` is a constant, as in all logs."""
        now_s = clock()
        if now_s < self._next_s.get(event, now_s):
            self._left_out[event] = self._left_out.get(event, 0) + 1
            return
        self._next_s[event] = now_s + INTERVAL_S
        left_out = self._left_out.pop(event, 0)
        self._log.log(level, event, extra=extra | {"left_out": left_out} if left_out else extra)
