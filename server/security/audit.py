"""The audit log: one line for each action of an administrator, allowed or denied."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import ServingError
from server.security.caller import Caller

log = logging.getLogger(__name__)

OK, FAILED, CANCELLED = "ok", "failed", "cancelled"

# Denied actions cost their caller nothing. More than these are only counted, so that nobody can
# fill the disk with them.
MAX_DENIED_PER_S = 10


MAX_TARGET = 128  # characters of a name that a client sends


class AuditLog:
    """Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._second = 0
        self._denied = 0
        self._not_logged = 0

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
        except GeneratorExit:
            raise
        except BaseException as error:
            outcome = FAILED if isinstance(error, Exception) else CANCELLED
            raise
        finally:
            log.info("admin_action", extra=_fields(caller, action, target) | {"outcome": outcome})

    def denied(self, caller: Caller, action: str, outcome: str) -> None:
        """Logs an action that was refused before its message was read."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._denied = second, 0
        self._denied += 1
        if self._denied > MAX_DENIED_PER_S:
            self._not_logged += 1
            return
        extra = _fields(caller, action, "") | {"outcome": outcome}
        if self._not_logged:
            extra["left_out"] = self._not_logged
            self._not_logged = 0
        log.warning("admin_action", extra=extra)


def _fields(caller: Caller, action: str, target: str) -> dict[str, str | int]:
    return {
        "principal": caller.principal.name,
        "peer": caller.peer.host,
        "action": action,
        "target": target[:MAX_TARGET],
    }
