"""Writes log lines in a thread, so that a log reader that stops can't stop the server.

A pipe holds 64 KiB. When it is full, a write waits until the reader takes something, and a reader
that hangs never does. So lines wait in a bounded queue. Lines that do not fit are dropped and
counted. When the reader continues, a line in their place says how many are missing.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from queue import SimpleQueue
from typing import NamedTuple

MAX_QUEUED_BYTES = 1 << 20
FLUSH_S = 1.0  # longest wait for a slow reader when the process ends
RETRY_S = 1.0  # between attempts on a file that is non-blocking and full

DROPPED_EVENT = "log_lines_dropped"


class _Line(NamedTuple):
    text: bytes
    dropped: int  # lines that were dropped before this one


class LogWriter(logging.Handler):
    """Log handler whose `emit` never waits for the reader of the log.

    Any thread may log. Under the handler's lock, the logging thread formats the line and puts it
    into the queue; only the writer's own thread writes to `descriptor`. It is a daemon: a blocked
    write does not keep the process from exiting.
    """

    def __init__(self, descriptor: int, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._max_queued_bytes = max_queued_bytes
        self._queue: SimpleQueue[_Line | threading.Event | None] = SimpleQueue()
        # Each number is changed in one place only, so that the threads need no common lock.
        self._queued_bytes = 0  # put into the queue so far; changed under the handler's lock
        self._written_bytes = 0  # taken out of it so far; changed by the writer's thread
        self._rejected = 0  # lines that did not fit; changed under the handler's lock
        self._failed = 0  # lines that could not be written; changed by the writer's thread
        self._reported = 0  # lines that DROPPED_EVENT reported; changed by the writer's thread
        self._thread = threading.Thread(target=self._write_forever, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Number of lines that were dropped so far."""
        return self._rejected + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self._encoded(record)
        except Exception:  # a value can't be formatted
            self.handleError(record)
            return
        if self._queued_bytes - self._written_bytes + len(text) > self._max_queued_bytes:
            self._rejected += 1
            return
        self._queued_bytes += len(text)
        self._queue.put(_Line(text, self._rejected))

    def handleError(self, record: logging.LogRecord) -> None:
        """Counts the line as dropped. The base class would write to standard error."""
        self._rejected += 1

    def flush(self) -> None:
        """Waits until the lines so far are written, at most FLUSH_S."""
        if self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(FLUSH_S)

    def close(self) -> None:
        """Ends the thread after the lines so far."""
        self._queue.put(None)
        super().close()

    # --- on the writer's thread ----------------------------------------------------------------

    def _write_forever(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                self._report(self._rejected)
                item.set()
                continue
            self._report(item.dropped)
            self._write(item.text)
            self._written_bytes += len(item.text)
            if self._queue.empty():
                self._report(self._rejected)

    def _report(self, rejected: int) -> None:
        """Writes how many lines are missing here, if any."""
        count = rejected + self._failed - self._reported
        if count <= 0:
            return
        values = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        record = logging.makeLogRecord({**values, "msg": DROPPED_EVENT, "count": count})
        if self._write(self._encoded(record), is_report=True):
            self._reported += count

    def _write(self, text: bytes, *, is_report: bool = False) -> bool:
        """Writes all of the text; blocks as long as the reader is slow."""
        try:
            while text:
                text = text[self._write_some(text) :]
        except OSError:  # the reader is gone, the disk is full, ...
            self._failed += not is_report
            return False
        return True

    def _write_some(self, text: bytes) -> int:
        try:
            return os.write(self._descriptor, text)
        except BlockingIOError:  # the parent process made the file non-blocking
            select.select([], [self._descriptor], [], RETRY_S)
            return 0

    def _encoded(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")


def dropped_log_lines() -> int:
    """Lines that the process's log handlers have dropped so far."""
    handlers = logging.getLogger().handlers
    return sum(handler.dropped for handler in handlers if isinstance(handler, LogWriter))
