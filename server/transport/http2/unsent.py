"""Bytes of responses that wait for their clients to read them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)


class UnsentBytes(Generic[S]):
    """Unsent bytes of all connections, by sender. Used on the event loop's thread only."""

    def __init__(self, limit: int, sender_limit: int) -> None:
        """`limit` is for all senders together, `sender_limit` for each."""
        self._limit = limit
        self._sender_limit = sender_limit
        self._by_sender: dict[S, int] = {}  # those that have some
        self.total = 0

    def __contains__(self, sender: S) -> bool:
        return sender in self._by_sender

    def __iter__(self) -> Iterator[S]:
        """The senders that have unsent bytes now."""
        return iter(list(self._by_sender))

    def update(self, sender: S, size: int) -> S | None:
        """Sets what a sender has. Returns the one that has too much, if any."""
        self.total += size - self._by_sender.pop(sender, 0)
        if size:
            self._by_sender[sender] = size
            if size > self._sender_limit:
                return sender
            if self.total > self._limit:
                return max(self._by_sender, key=self._by_sender.__getitem__)
        return None
