"""A limit that principals share: none can use all of it up."""

from __future__ import annotations

from server.security.principal import ANONYMOUS, Principal

# A principal may hold this many times what is free, so alone 8/9 of the limit. The rest is there at
# once for others. The more others hold, the less is free, and the less may one principal hold.
# (Dynamic thresholds, as in switches that share a buffer: Choudhury and Hahne, 1998.)
MAX_TIMES_FREE = 8


class FairLimit:
    """Counts what principals hold of something that is limited: calls, bytes, images.

    If several principals want more than there is, each gets a part in proportion to its weight.
    Anonymous callers may use the whole limit. Used on the event loop's thread only.
    """

    __slots__ = ("_held", "_weights", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[str, int] = {}  # by principal
        self._weights: dict[str, float] = {}  # of the principals that hold something

    def fits(self, principal: Principal, size: int) -> bool:
        """Whether a principal may hold `size` more."""
        free = self.limit - self.used
        name = principal.name
        if name == ANONYMOUS:
            return size <= free
        others = sum(self._weights.values()) - self._weights.get(name, 0.0)
        return may_hold(self._held.get(name, 0) + size, size, free, principal.weight, others)

    def held(self, principal: Principal) -> int:
        """What a principal holds; 0 for anonymous callers."""
        return self._held.get(principal.name, 0)

    def add(self, principal: Principal, size: int) -> None:
        self.used += size
        name = principal.name
        if size and name != ANONYMOUS:
            self._held[name] = self._held.get(name, 0) + size
            self._weights[name] = principal.weight

    def remove(self, principal: Principal, size: int) -> None:
        """Gives back what the same principal has added."""
        self.used -= size
        name = principal.name
        if size and name != ANONYMOUS:
            self._held[name] -= size
            if not self._held[name]:
                del self._held[name], self._weights[name]


def may_hold(held: int, added: int, free: int, weight: float, others_weight: float) -> bool:
    """Whether a principal may hold `held`, with `added` of it taken from what is `free`.

    `others_weight` is the sum of the weights of the others that hold something.
    """
    part = weight / (weight + others_weight)
    return added <= free and held <= MAX_TIMES_FREE * free * part
