"""`python -m server`: argv and environment to settings, and off it goes."""

import logging
import os
import sys

import uvloop

from server import logs
from server.app import CannotServe, serve
from server.settings import parse

log = logging.getLogger("server")


def main() -> int:
    settings = parse(sys.argv[1:], os.environ)
    logs.configure(settings.log_level, settings.log_format)
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
