"""The clock for all deadlines and measurements in the server."""

from __future__ import annotations

import time

clock = time.monotonic  # not the event loop's clock: under uvloop that has a resolution of 1 ms
