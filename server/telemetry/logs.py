"""Structured logs: one line per event, as JSON or as plain text.

    log.info("version_loaded", extra={"model": "lenet5", "version": 1})

The message is the event's name, a constant. All data are key=value pairs. Values may hold text of
clients: they are quoted, so that an event stays on one line.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from datetime import UTC, datetime

from server.telemetry.log_writer import LogWriter

log = logging.getLogger(__name__)

AUDIT = "server.security.audit"
STDERR = 2  # file descriptor

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(level: str, format: str) -> None:
    """Logs to standard error: the server's events from `level` on, libraries' from warning on."""
    handler = LogWriter(STDERR)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Libraries stay at WARNING: at DEBUG some log metadata, credentials included.
    logging.getLogger(__name__.partition(".")[0]).setLevel(level.upper())
    # An audit log with gaps is worth nothing, so the level does not apply to it.
    logging.getLogger(AUDIT).setLevel(logging.INFO)


def log_python_messages() -> None:
    """Logs what Python itself writes to standard error, where it would wait for the reader.

    These are warnings, errors of threads, and errors that can't be raised.
    """
    logging.captureWarnings(True)
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread_failed


def _log_unraisable(error: sys.UnraisableHookArgs) -> None:
    log.error("error_ignored", extra={"where": repr(error.object)}, exc_info=error.exc_value)


def _log_thread_failed(error: threading.ExceptHookArgs) -> None:
    if not isinstance(error.exc_value, SystemExit):
        name = error.thread.name if error.thread else ""
        log.error("thread_failed", extra={"thread_name": name}, exc_info=error.exc_value)


class JsonLines(logging.Formatter):
    """`{"time": ..., "level": ..., "event": ..., ...}`"""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), **_fields(self, record)}
        return json.dumps({key: _number(value) for key, value in line.items()}, default=str)


class TextLines(logging.Formatter):
    """`12:00:00.000 info version_loaded model=lenet5 version=1`"""

    def format(self, record: logging.LogRecord) -> str:
        entries = _fields(self, record)
        event, stack = entries.pop("event"), entries.pop("stack", None)
        pairs = [f"{key}={_quoted(value)}" for key, value in entries.items()]
        line = " ".join([_time(record)[11:23], record.levelname.lower(), _line(event), *pairs])
        if not stack:
            return line
        return "\n    ".join([line, *map(_line, str(stack).splitlines())])


def _fields(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, object]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    stack = {}
    if record.exc_info:
        stack = {"stack": formatter.formatException(record.exc_info)}
    return {"event": record.getMessage(), **extra, **stack}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _number(value: object) -> object:
    """Floats that JSON lacks (infinity, NaN) become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _quoted(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    plain = text and text.isprintable() and not any(c in text for c in ' "=')
    return text if plain else json.dumps(text)


def _line(event: object) -> str:
    """The message on one line, without control characters. Libraries log whole sentences."""
    text = str(event)
    return text if text.isprintable() else json.dumps(text)
