"""`python -m server`: argv and environment to settings, and off it goes."""

import gc
import logging
import os
import sys
import threading

import uvloop

from server.app import LOADER, CannotServe, serve
from server.process import allocator
from server.settings import Settings, parse
from server.telemetry import logs

log = logging.getLogger("server")


# Engines' threads and gRPC's hand each other small things all the time, and each waits so long for
# one that computes. At Python's own 5 ms a server of LeNet-5 at its limit (4,200 calls a second,
# 20 ms of deadline) answered 0 to 45 % in time; at this, 36 to 98 %.
SWITCH_S = 0.0005


JOIN_S = 0.5  # for a thread with nothing to do to end

# New objects between two looks for garbage: calls make hundreds each, and leave none.
COLLECT = 10_000


def _open_standard_files() -> None:
    """Where 0, 1 or 2 is closed the next file to be opened gets its number, and what others write
    there goes into a socket; libuv ends the process when it closes one of them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def main() -> int:
    _open_standard_files()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(COLLECT)
    allocator.keep_freed(os.environ)
    settings = parse(sys.argv[1:], os.environ)
    logs.configure(settings.log_level, settings.log_format)
    status = _served(settings)
    loading = [one for one in threading.enumerate() if one.name.startswith(LOADER)]
    for thread in loading:
        thread.join(JOIN_S)
    if any(thread.is_alive() for thread in loading):
        logging.shutdown()
        os._exit(status)  # Python would wait for what is being loaded, which nobody needs
    return status


def _served(settings: Settings) -> int:
    """The status to exit with."""
    try:
        uvloop.run(serve(settings))
    except CannotServe as error:
        log.critical("cannot_serve", extra={"reason": str(error)})
        return 1
    except Exception:
        log.critical("crashed", exc_info=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
