"""Quotas: how many images a second a principal may send."""

from __future__ import annotations

import math
from collections.abc import Iterable

from server.errors import InvalidInput, QuotaExceeded
from server.security.principal import Principal


class Quotas:
    """Token buckets of all principals that have a limit. Used on the event loop's thread only.

    A bucket holds `burst` images at most and gets `images_per_s`. It outlives a reload of the auth
    file: nobody gets a full bucket by changing it.
    """

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}  # by principal

    def charge(self, principal: Principal, images: int, now_s: float) -> None:
        """Takes `images` from a principal's quota. Raises QuotaExceeded, InvalidInput."""
        if principal.images_per_s == math.inf:
            return
        if images > principal.burst:
            raise InvalidInput(
                "images",
                f"are {images}; the quota of {principal.name} allows {principal.burst:g} at once "
                "(burst); send fewer in one request",
            )
        bucket = self._buckets.get(principal.name)
        if bucket is None:
            bucket = self._buckets[principal.name] = _Bucket(principal, now_s)
        missing = images - bucket.filled(principal, now_s)
        if missing > 0:
            wait_s = missing / principal.images_per_s
            raise QuotaExceeded(
                f"the quota of {principal.name} is used up: {principal.images_per_s:g} images/s, "
                f"{principal.burst:g} at once",
                retry_after_s=wait_s,
            )
        bucket.take(images)

    def refund(self, principal: Principal, images: int) -> None:
        """Gives back what was charged for a request that was not admitted."""
        bucket = self._buckets.get(principal.name)
        if bucket is not None:
            bucket.take(-images)

    def keep(self, principals: Iterable[str]) -> None:
        """Forgets all principals but these."""
        kept = set(principals)
        self._buckets = {name: one for name, one in self._buckets.items() if name in kept}


class _Bucket:
    __slots__ = ("_filled_s", "_images")

    def __init__(self, principal: Principal, now_s: float) -> None:
        self._images = principal.burst
        self._filled_s = now_s

    def filled(self, principal: Principal, now_s: float) -> float:
        """The images that are in the bucket now."""
        gained = (now_s - self._filled_s) * principal.images_per_s
        self._images = min(principal.burst, self._images + gained)
        self._filled_s = now_s
        return self._images

    def take(self, images: int) -> None:
        self._images -= images
