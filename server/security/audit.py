"""The audit log: one line for each action of an administrator, allowed or denied."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import ServingError
from server.security.caller import Caller

log = logging.getLogger(__name__)

OK, FAILED, CANCELLED = "ok", "failed", "cancelled"

# Denied actions cost their caller nothing. More than these of one principal are only counted, so
# that nobody can fill the disk with them, or hide another principal's action among them.
MAX_DENIED_PER_S = 10

MAX_TARGET = 128  # characters of a name that a client sends


class AuditLog:
    """Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._second = 0
        self._denied: Counter[str] = Counter()  # in this second, by principal
        self._left_out: Counter[str] = Counter()

    @contextmanager
    def action(self, caller: Caller, action: str, target: str) -> Iterator[None]:
        """Logs an action when it ends, with its outcome."""
        outcome = FAILED
        try:
            yield
            outcome = OK
        except ServingError as error:
            outcome = type(error).__name__
            raise
        except BaseException as error:
            outcome = FAILED if isinstance(error, Exception) else CANCELLED
            raise
        finally:
            log.info("admin_action", extra=_fields(caller, action, target) | {"outcome": outcome})

    def denied(self, caller: Caller, action: str, outcome: str) -> None:
        """Logs an action that was refused before its message was read."""
        name, second = caller.principal.name, int(time.monotonic())
        if second != self._second:
            self._second = second
            self._denied.clear()
        self._denied[name] += 1
        if self._denied[name] > MAX_DENIED_PER_S:
            self._left_out[name] += 1
            return
        extra = _fields(caller, action, "") | {"outcome": outcome}
        if left_out := self._left_out.pop(name, 0):
            extra["left_out"] = left_out
        log.warning("admin_action", extra=extra)


def _fields(caller: Caller, action: str, target: str) -> dict[str, str | int]:
    return {
        "principal": caller.principal.name,
        "peer": caller.peer.host,
        "action": action,
        "target": target[:MAX_TARGET],
    }
