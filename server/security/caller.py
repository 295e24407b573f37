"""The caller of a request: its principal and its connection."""

from __future__ import annotations

import math
from typing import NamedTuple

from server.security.peer import Peer
from server.security.principal import LOCAL_CALLER, Principal


class Caller(NamedTuple):
    """A principal at the other end of a connection."""

    principal: Principal
    peer: Peer
    expires_s: float = math.inf  # Unix time when its credential ends


# The caller of requests that come from no connection.
IN_PROCESS = Caller(LOCAL_CALLER, Peer("", True, None))
