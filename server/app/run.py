"""Runs the server: prepares the process, reads the settings, then serves until a signal arrives."""

import gc
import logging
import os
import sys

import uvloop

from server.app.lifecycle import serve
from server.errors import CannotServe
from server.process import allocator
from server.process.load_thread import is_still_loading
from server.settings import Settings, parse
from server.telemetry import logs

log = logging.getLogger("server")

# Engine threads and the event loop hand small objects to each other all the time. Each handover
# waits up to this time for a thread that computes. Measured with LeNet-5 at its limit (4,200
# requests a second, deadline 20 ms): 0 to 45 % were answered in time at Python's default of 5 ms,
# 36 to 98 % at this value.
SWITCH_INTERVAL_S = 0.0005

# New objects between two garbage collections. A request makes hundreds and leaves no cycles.
GC_THRESHOLD = 10_000


def run() -> int:
    """Serves with the settings of the command line. Returns the exit status."""
    _open_standard_files()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(GC_THRESHOLD)
    allocator.keep_freed(os.environ)
    settings = parse(sys.argv[1:], os.environ)
    logs.configure(settings.log_level, settings.log_format)
    logs.log_python_messages()
    status = _serve(settings)
    if is_still_loading():
        logging.shutdown()
        os._exit(status)  # a normal exit would wait for the load
    return status


def _open_standard_files() -> None:
    """Opens file descriptors 0, 1 and 2 if they are closed.

    Otherwise the next files get these numbers: output meant for standard error would go into a
    socket, and libuv ends the process when it closes one of them.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _serve(settings: Settings) -> int:
    """Returns the exit status."""
    try:
        uvloop.run(serve(settings))
    except CannotServe as error:
        log.critical("cannot_serve", extra={"reason": str(error)})
        return 1
    except Exception:
        log.critical("server_crashed", exc_info=True)
        return 1
    return 0
