"""Streams of an HTTP/2 connection: a request, and how its response is sent.

libnghttp2 may have closed a stream before its event is handled here, so a send can fail. The event
follows and ends the stream.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ngh2 import Connection
from ngh2.enums import ErrorCode
from ngh2.exceptions import NGH2Error

from server.security.peer import peer_of
from server.transport.http2.frame_limits import Work
from server.transport.http2.unsent import UnsentBytes
from server.transport.metadata import Header, fitted

MAX_SIZE = (1 << 32) - 1


class Stream(ABC):
    """A request and its response. Methods run on the loop's thread and do not block."""

    __slots__ = ("ended", "open", "sender", "stream_id")

    sender: ResponseSender
    stream_id: int
    ended: bool  # the client has sent the whole request
    open: bool  # a response may still be sent

    @abstractmethod
    def received(self, data: bytes, is_last: bool) -> None:
        """Handles bytes of the request's body. The stream must `consume` them at some time."""

    @abstractmethod
    def request_ended(self) -> None:
        """Handles the end of a request without further bytes."""

    @abstractmethod
    def aborted(self) -> None:
        """Handles a reset or a lost connection, unless the response is complete."""

    @abstractmethod
    def gone(self) -> None:
        """Releases what the stream holds. Called once, however it ended."""

    def sent(self) -> None:  # noqa: B027  optional
        """Called after a `send` that returned False, when its data has been sent."""


class ResponseSender:
    """Sends the responses of one connection.

    All that is queued in one turn of the loop is written together. While the transport's buffer is
    full, nothing is written. Events that come from writing go to `on_event`. `on_overflow` is
    called in a later turn, if this client leaves too much unread.
    """

    def __init__(
        self,
        http2: Connection,
        transport: Any,
        streams: dict[int, Stream],
        on_event: Callable[[Any], None],
        unsent: UnsentBytes[ResponseSender],
        on_overflow: Callable[[], None],
    ) -> None:
        self.peer = peer_of(transport)
        self._http2 = http2
        self._transport = transport
        self._streams = streams
        self._on_event = on_event
        self._unsent = unsent
        self.on_overflow = on_overflow
        self._loop = asyncio.get_running_loop()
        self._is_scheduled = False
        self.is_writable = True  # the transport's buffer is not full
        self._waiting: set[int] = set()  # streams that wait for `sent`
        self._early: set[int] = set()  # streams whose response ends before their request
        self.has_unsent_bytes = False  # the client does not read all responses at once
        self._writes = 0
        self._written_bytes = 0
        self._max_headers_bytes = MAX_SIZE  # that the client takes
        self._body_bytes = 0  # of responses, written or not
        self.is_closed = False  # nothing more is sent

    # --- for streams -------------------------------------------------------------------------

    def answer(
        self, stream: Stream, head: Sequence[Header], body: bytes, trailers: tuple[Header, ...]
    ) -> None:
        """Sends a whole response."""
        if self.is_closed:
            return
        stream_id, http2 = stream.stream_id, self._http2
        if len(trailers) > 1:
            trailers = fitted(trailers, self._max_headers_bytes)
        try:
            http2.send_response(stream_id, head)
            http2.send_data(stream_id, body)
            http2.send_trailers(stream_id, trailers)
        except NGH2Error:
            return
        self._body_bytes += len(body)
        stream.open = False
        if not stream.ended:
            self._early.add(stream_id)
        if len(self._streams) == 1:
            self.flush()  # no other response could share the write
        elif not self._is_scheduled:
            self.flush_soon()

    def begin(self, stream: Stream, head: Sequence[Header]) -> None:
        """Sends the headers of a response."""
        if not self.is_closed:
            with suppress(NGH2Error):
                self._http2.send_response(stream.stream_id, head)
            self.flush_soon()

    def refuse(self, stream_id: int, head: tuple[Header, ...], request_ended: bool) -> None:
        """Sends the headers of a response that has nothing else."""
        if self.is_closed:
            return
        try:
            fitting = fitted(head, self._max_headers_bytes)
            self._http2.send_response(stream_id, fitting, end_stream=True)
        except NGH2Error:
            return
        if not request_ended:
            self._early.add(stream_id)
        self.flush_soon()

    def send(self, stream: Stream, data: bytes) -> bool:
        """Sends a part of a response's body.

        Returns False if an earlier part waits for the client. Then `stream.sent` is called when all
        parts have been sent.
        """
        if self.has_unsent(stream):
            self.flush()
        waits = self.has_unsent(stream)
        if self.is_closed or not stream.open:
            return True
        try:
            self._http2.send_data(stream.stream_id, data)
        except NGH2Error:
            return True
        self._body_bytes += len(data)
        if waits:
            self._waiting.add(stream.stream_id)
        self.flush_soon()
        return not waits

    def end(self, stream: Stream, trailers: tuple[Header, ...]) -> None:
        """Sends the trailers of a response, after its body."""
        if self.is_closed:
            return
        try:
            fitting = fitted(trailers, self._max_headers_bytes)
            self._http2.send_trailers(stream.stream_id, fitting)
        except NGH2Error:
            return
        stream.open = False
        if not stream.ended:
            self._early.add(stream.stream_id)
        self.flush_soon()

    def has_unsent(self, stream: Stream) -> bool:
        """Whether a part of the response's body waits to be sent."""
        return not self.is_closed and self._http2.queued_body_size(stream.stream_id) > 0

    def cancel(self, stream: Stream) -> None:
        """Resets a stream whose response the client does not read."""
        stream.open = False
        self.reset(stream.stream_id, ErrorCode.CANCEL)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        if not self.is_closed:
            with suppress(NGH2Error):
                self._http2.reset_stream(stream_id, code)
            self.flush_soon()

    def consume(self, stream_id: int, size: int) -> None:
        """Lets the client send `size` more bytes."""
        if not self.is_closed:
            try:
                self._http2.acknowledge_received_data(size, stream_id)
            except NGH2Error:  # the session is terminating
                return
            if not self._is_scheduled:
                self.flush_soon()

    @property
    def open_streams(self) -> int:
        """Number of the client's calls in progress."""
        return len(self._streams)

    # --- for the connection ------------------------------------------------------------------

    def hold(self) -> bool:
        """Schedules no write until `release`. Returns what `release` needs.

        A write that is scheduled while input is read would run before the tasks of the calls that
        start there.
        """
        was_scheduled, self._is_scheduled = self._is_scheduled, True
        return was_scheduled

    def release(self, was_scheduled: bool) -> None:
        self._is_scheduled = was_scheduled
        if not self.is_closed and (self._early or self._http2.want_write):
            self.flush_soon()

    def flush_soon(self) -> None:
        """Schedules a write."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes what is queued."""
        self._is_scheduled = False
        while self.is_writable and not self.is_closed:
            data = self._http2.data_to_send()
            if data:
                self._writes += 1
                self._written_bytes += len(data)
                self._transport.write(data)
            for event in self._http2.events():
                self._on_event(event)
            if not (self._early or self._waiting) or not self._after_write():
                break
        if self.has_unsent_bytes or not self.is_writable or self._http2.queued_body_size():
            self._count_unsent()

    def pause(self) -> None:
        """Writes nothing until `resume`: the client does not read."""
        self.is_writable = False
        self._count_unsent()

    def resume(self) -> None:
        self.is_writable = True
        self.flush()

    def work(self, requests: int) -> Work:
        """What the server has done for this client, with the number of its requests."""
        return Work(requests, self._writes, self._written_bytes)

    @property
    def delivered_bytes(self) -> int:
        """Bytes of bodies that the operating system has taken. Grows while the client reads."""
        waiting = int(self._transport.get_write_buffer_size())
        return self._body_bytes - self._http2.queued_body_size() - waiting

    def limit_headers(self, size: int) -> None:
        """The client takes headers of at most `size` bytes."""
        self._max_headers_bytes = size

    def request_ended(self, stream_id: int) -> None:
        """The rest of a request has come that was refused before its end."""
        self._early.discard(stream_id)

    def forget(self, stream_id: int) -> None:
        """The stream is closed."""
        if self._early:
            self._early.discard(stream_id)
        if self._waiting:
            self._waiting.discard(stream_id)

    def stop(self) -> None:
        """Sends nothing more: the connection is closed, or is being closed."""
        self.is_closed = True
        self._unsent.update(self, 0)

    def _count_unsent(self) -> None:
        size = self._http2.queued_body_size()
        if not self.is_writable:
            size += int(self._transport.get_write_buffer_size())
        self.has_unsent_bytes = size > 0
        sender = self._unsent.update(self, size)
        if sender is not None:
            self._loop.call_soon(sender.on_overflow)

    def _after_write(self) -> bool:
        """Handles what follows from written data. Returns whether there is more to write."""
        unsent = self._http2.queued_body_size
        if self._waiting:
            for stream_id in [one for one in self._waiting if not unsent(one)]:
                self._waiting.discard(stream_id)
                stream = self._streams.get(stream_id)
                if stream is not None:
                    stream.sent()
        has_resets = False
        for stream_id in [one for one in self._early if not unsent(one)]:
            # The response is complete. RFC 9113, 8.1: the client need not send the rest.
            self._early.discard(stream_id)
            with suppress(NGH2Error):
                self._http2.reset_stream(stream_id, ErrorCode.NO_ERROR)
                has_resets = True
        return has_resets
