"""Splits the requests that name no version between the stable version and the canary."""

from __future__ import annotations

from hashlib import blake2b


class CanarySplit:
    """Gives a canary its fraction of the requests.

    A request ID always gets the same answer, so that retries reach the same version. Requests
    without an ID are spread evenly: at 25 % every fourth one goes to the canary.
    """

    def __init__(self) -> None:
        self._owed = 0.0  # requests without an ID that the canary should have got by now

    def takes(self, fraction: float, request_id: str) -> bool:
        """Whether the canary gets this request."""
        if request_id:
            digest = blake2b(request_id.encode(), digest_size=8).digest()
            return int.from_bytes(digest) < fraction * 2**64
        self._owed += fraction
        is_taken = self._owed >= 1
        self._owed -= is_taken
        return is_taken
