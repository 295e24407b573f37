"""Bodies of HTTP requests, read within limits of bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from server.api.context import CallContext
from server.api.http.form import MAX_FORM_BYTES, is_form
from server.api.in_flight import InFlightLimits
from server.api.v2.versions import MAX_QUOTED
from server.errors import InvalidInput, ModelNotReady
from server.security.principal import Principal
from server.telemetry.clock import clock
from server.transport.compression import (
    WINDOW_BITS,
    DecompressionError,
    Inflater,
    TooLargeError,
)

# A body has MAX_BODY_S to arrive, and longer if it is large and keeps this rate, as over a slow
# mobile link. Its bytes count as in progress meanwhile, but it is no call yet: clients that send
# slowly must not take the calls of the others.
MAX_BODY_S = 30.0
MIN_BYTES_PER_S = 32 << 10
IDENTITY = "identity"
ENCODINGS = (IDENTITY, *WINDOW_BITS)

# For a client that asked whether to send its body ("Expect: 100-continue") and is refused. It may
# send the body or not, so the connection cannot be used again. A client that is sending already
# must not be cut off: it would lose the response.
CLOSE = {"Connection": "close"}


class BodyReader:
    """Reads bodies and counts their bytes as in flight. Used on the event loop's thread only."""

    def __init__(self, in_flight: InFlightLimits, inflater: Inflater) -> None:
        self._in_flight = in_flight
        self._inflater = inflater
        self._receiving: set[asyncio.Task[Any]] = set()
        self._is_stopped = False

    @property
    def receiving(self) -> set[asyncio.Task[Any]]:
        """Tasks that wait for a body."""
        return set(self._receiving)

    def stop(self) -> None:
        """Ends all tasks that wait for a body; their calls end as ModelNotReady."""
        self._is_stopped = True
        for task in self._receiving:
            task.cancel()

    @asynccontextmanager
    async def read(
        self, request: Request, limit: int, context: CallContext
    ) -> AsyncIterator[bytes]:
        """The body, of at most `limit` bytes, a form of a few more.

        It counts as a call in progress from its last byte until the end.

        Raises TimeoutError when the deadline passes, HTTPException, InvalidInput, Overloaded,
        QuotaExceeded, and ModelNotReady when the server stops.
        """
        principal = context.caller.principal
        held = _HeldBytes(self._in_flight, principal)
        if is_form(request):
            limit += MAX_FORM_BYTES
        is_call = False
        try:
            self._in_flight.check(principal)
            close = CLOSE if "expect" in request.headers else None
            encoding = _encoding(request, close)
            length = request.headers.get("content-length", "")
            if length.isdecimal() and int(length) > limit:
                raise _too_large(limit, close)
            body = await self._receive(request, limit, context.deadline_s, held)
            if encoding != IDENTITY:
                body = await self._inflate(body, encoding, limit, held)
            is_call = True
            self._in_flight.begin(principal)
            yield body
        finally:
            self._in_flight.remove_bytes(principal, held.size)
            if is_call:
                self._in_flight.end(principal)

    async def _receive(
        self, request: Request, limit: int, deadline_s: float, held: _HeldBytes
    ) -> bytes:
        began_s = clock()
        left_s = deadline_s - began_s
        task = asyncio.current_task()
        assert task is not None
        self._receiving.add(task)
        body = BytesIO()
        try:
            async with asyncio.timeout(min(left_s, MAX_BODY_S)) as timeout:
                ends_at = asyncio.get_running_loop().time() + MAX_BODY_S
                last_s = ends_at + left_s - MAX_BODY_S
                async for part in request.stream():
                    if held.size + len(part) > limit:
                        raise _too_large(limit)
                    held.add(len(part))
                    body.write(part)
                    timeout.reschedule(min(last_s, ends_at + held.size / MIN_BYTES_PER_S))
        except TimeoutError:
            if clock() < began_s + left_s:
                raise HTTPException(408, _too_slow(held.size)) from None
            raise
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
            task.uncancel()
            raise ModelNotReady("the server has stopped") from None
        finally:
            self._receiving.discard(task)
        return body.getvalue()  # no copy, see CPython's BytesIO

    async def _inflate(self, body: bytes, encoding: str, limit: int, held: _HeldBytes) -> bytes:
        """Raises InvalidInput, Overloaded, and HTTPException for more than `limit` bytes."""
        try:
            inflated = await self._inflater.inflate(body, encoding, limit, held.add)
        except TooLargeError as error:
            raise HTTPException(413, f"the body {error}") from None
        except DecompressionError as error:
            raise InvalidInput("body", str(error)) from None
        held.remove(len(body))
        return inflated


class _HeldBytes:
    """The bytes of one body that are counted as in flight."""

    def __init__(self, in_flight: InFlightLimits, principal: Principal) -> None:
        self.size = 0
        self._in_flight = in_flight
        self._principal = principal

    def add(self, size: int) -> None:
        """Raises Overloaded; the bytes are counted anyway, until the call ends."""
        self.size += size
        self._in_flight.add_bytes(self._principal, size)

    def remove(self, size: int) -> None:
        self.size -= size
        self._in_flight.remove_bytes(self._principal, size)


def _encoding(request: Request, close: Mapping[str, str] | None) -> str:
    encoding = request.headers.get("content-encoding", IDENTITY).strip().lower()
    if encoding not in ENCODINGS:
        given = encoding[:MAX_QUOTED]
        message = f"Content-Encoding: {given!r}; {', '.join(ENCODINGS)} are understood"
        raise HTTPException(415, message, close)
    return encoding


def _too_slow(size: int) -> str:
    return (
        f"{size:,} bytes of the body came in time; {MAX_BODY_S:.0f} s are allowed, and 1 s for "
        f"each {MIN_BYTES_PER_S:,} bytes"
    )


def _too_large(limit: int, headers: Mapping[str, str] | None = None) -> HTTPException:
    message = f"the body has more than {limit:,} bytes; no more are allowed"
    return HTTPException(413, message, headers)
