"""Lets signals end a process that is still starting.

The kernel delivers a signal to process 1 of a container only if the process has a handler for it.
So a SIGTERM before that is lost, and `docker stop` waits for its timeout and kills the container.
The commands therefore install a handler before their large imports, which take a second or more.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_on(signals: Sequence[signal.Signals], status: int | None = None) -> None:
    """Ends the process when one of the signals arrives, until another handler replaces this one.

    The exit status is `status`, or 128 plus the signal's number. Nothing is cleaned up, as by the
    signal's default action. Signals that the process ignores stay ignored, as `nohup` wants it.
    """

    def end(number: int, _: object) -> None:
        # An exception could be lost: libraries catch what is raised while they are imported.
        os._exit(128 + number if status is None else status)

    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
