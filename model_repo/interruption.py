"""Ends a build at once when a signal arrives, and removes its unfinished files before.

A process that is process 1 of a container gets a signal only if it has a handler for it, so the
build installs its handlers before it imports torch. Python runs handlers between two steps of the
main thread, which may be in a compiler for minutes. So a second thread waits for the signal too,
and the first one of them ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from server.process.early_signals import STOP_SIGNALS

SHOW_CURSOR = b"\r\x1b[K\x1b[?25h"  # clears the progress bar, which hides the cursor
NO_SIGNAL = b"\0"


class Interruption:
    """Context in which a stop signal ends the process with status 128 plus the signal's number.

    Enter it in the main thread. Signals that the process ignores stay ignored, as `nohup` wants it.
    """

    def __init__(self) -> None:
        self._cleanups: list[Callable[[], None]] = []
        self._ending = threading.RLock()  # its first owner ends the process and never releases it
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._wait, name="stop signals", daemon=True)

    def before_exit(self, cleanup: Callable[[], None]) -> None:
        """Calls `cleanup` before the process ends. It may run in another thread."""
        self._cleanups.append(cleanup)

    def __enter__(self) -> Interruption:
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in self._handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda received, _: self._end(received))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, NO_SIGNAL)
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _wait(self) -> None:
        """Waits for the number of a signal, which Python writes into the pipe."""
        while (received := os.read(self._read, 1)) != NO_SIGNAL:
            if received[0] in STOP_SIGNALS:
                self._end(received[0])

    def _end(self, number: int) -> None:
        """Ends the process. Holds up the main thread if another thread is ending it already."""
        self._ending.acquire()
        for cleanup in reversed(self._cleanups):
            with suppress(Exception):
                cleanup()
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            if select.select([], [2], [], 0)[1]:  # a full pipe must not hold up the end
                os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        # An exception could be lost: libraries catch what is raised while they are imported.
        os._exit(128 + number)
