"""Calls and bytes that principals hold on one server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.security.principal import LOCAL_CALLER, Principal
from server.telemetry.loop_lag import LoopLag
from server.transport.calls.calls_in_progress import CallsInProgress, TransportLimits
from server.transport.compression import Inflater

FLOOD, MODEST = (Principal(name=name, roles=frozenset()) for name in ("flood", "modest"))


@contextmanager
def calls_in_progress() -> Iterator[CallsInProgress[int]]:
    limits = TransportLimits(message_bytes=100, receiving_bytes=900, streams=9, calls=90)
    with Inflater() as inflater:
        yield CallsInProgress(limits, inflater, LoopLag())


async def test_one_principal_leaves_bytes_for_others() -> None:
    with calls_in_progress() as calls:
        assert all(calls.hold(FLOOD, 100) for _ in range(8))
        assert not calls.hold(FLOOD, 50), "counted, but too many"
        assert calls.hold(MODEST, 40)
        calls.hold(FLOOD, -850)
        assert calls.hold(MODEST, 100)
        calls.hold(MODEST, -140)
        assert calls.receiving_bytes == 0


async def test_anonymous_callers_hold_all_bytes() -> None:
    with calls_in_progress() as calls:
        assert calls.hold(LOCAL_CALLER, 900)
        assert not calls.hold(LOCAL_CALLER, 1)
        assert calls.hold(LOCAL_CALLER, -901)


async def test_one_principal_leaves_calls_for_others() -> None:
    with calls_in_progress() as calls:
        for call in range(80):
            assert calls.fits(FLOOD)
            calls.add(call, FLOOD)
        assert not calls.fits(FLOOD)
        assert calls.fits(MODEST)
        for call in range(80):
            calls.remove(call)
            calls.remove(call)
        assert calls.fits(FLOOD)
        assert calls.idle.is_set()
