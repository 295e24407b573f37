"""What a fuzz target is: it makes inputs, and feeds them to a part of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from random import Random

# Feeds one input. Returns whether it was accepted; refusals with an expected error are False. Every
# other exception is a fault.
Feed = Callable[[bytes], bool]


@dataclass(frozen=True)
class Target:
    """Something that reads foreign bytes."""

    name: str
    make: Callable[[Random], bytes]
    feed: Callable[[], AbstractContextManager[Feed]]
    share: float  # of all inputs of a run


def parser(
    parse: Callable[[bytes], object], *refusals: type[Exception]
) -> Callable[[], AbstractContextManager[Feed]]:
    """The `feed` of a function that parses, or raises one of `refusals`."""

    def feed(data: bytes) -> bool:
        try:
            parse(data)
        except refusals:
            return False
        return True

    @contextmanager
    def opened() -> Iterator[Feed]:
        yield feed

    return opened
