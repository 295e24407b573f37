"""One unary gRPC call on an HTTP/2 stream (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from abc import abstractmethod

import grpc

from convserve_client.async_client import MAX_MESSAGE_BYTES
from convserve_client.error_translation import MAX_PUSHBACK_DIGITS, translate
from convserve_client.loadgen.wire.connection import ClientConnection, Stream
from convserve_client.loadgen.wire.headers import ResponseHead

MESSAGE_HEAD_BYTES = 5  # 1 byte: is the message compressed; 4 bytes: its length
MAX_BODY_BYTES = MESSAGE_HEAD_BYTES + MAX_MESSAGE_BYTES

CODES = {code.value[0]: code for code in grpc.StatusCode}
OK, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED, PERMISSION_DENIED = 0, 1, 2, 4, 7
RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, UNAUTHENTICATED = 8, 12, 13, 14, 16
# gRPC's status of a response without one, by its HTTP status
CODE_OF_HTTP_STATUS = {
    **{"400": INTERNAL, "401": UNAUTHENTICATED, "403": PERMISSION_DENIED, "404": UNIMPLEMENTED},
    **dict.fromkeys(("429", "502", "503", "504"), UNAVAILABLE),
}
# gRPC's status of a stream that was reset, by HTTP/2's error code
CODE_OF_RESET = {
    5: UNKNOWN,  # STREAM_CLOSED
    7: UNAVAILABLE,  # REFUSED_STREAM
    8: CANCELLED,  # CANCEL
    11: RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    12: PERMISSION_DENIED,  # INADEQUATE_SECURITY
}


def framed(message: bytes) -> bytes:
    """A message with gRPC's length prefix, as it is sent."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class UnaryCall(Stream):
    """A call that a channel sends. Once it is done, the channel can send it again.

    A call must be cheap for the load generator. It is one object whose `ended` is called when it
    is done; it has no task, no future and no timer of its own.
    """

    __slots__ = (
        "_body",
        "_head",
        "answer",
        "code",
        "connection",
        "deadline_s",
        "is_done",
        "message",
        "trailers",
    )

    def begin(self, deadline_s: float) -> None:
        """Called by the channel when it sends the call."""
        self.connection: ClientConnection | None = None  # that carries the call
        self.is_done = False
        self.deadline_s = deadline_s
        self.code = OK  # gRPC's status as a number
        self.message = ""  # of the status
        self.answer = b""
        self.trailers: ResponseHead | None = None
        self._head: ResponseHead | None = None
        self._body: bytes | bytearray = b""

    @abstractmethod
    def ended(self) -> None:
        """Called when the call is done, never from within `Channel.start`.

        `code`, `message`, `answer` and `trailers` hold the result.
        """

    def failure(self) -> grpc.aio.AioRpcError:
        """The error that grpcio would raise for this call."""
        trailing = self.trailers.metadata() if self.trailers else []
        return grpc.aio.AioRpcError(
            CODES[self.code],
            grpc.aio.Metadata(),
            grpc.aio.Metadata(*trailing),
            self.message,
            None,
        )

    def retry_after_s(self) -> float:
        """Seconds that a refusal asks to wait; -1 if it asks for no wait or forbids a retry."""
        for key, value in self.trailers.fields if self.trailers else ():
            if key == b"grpc-retry-pushback-ms":  # cheaper to read than a google.rpc.RetryInfo
                is_number = value.isdigit() and len(value) <= MAX_PUSHBACK_DIGITS
                return int(value) / 1000 if is_number else -1.0
        retry_after_s = translate(self.failure(), connected=True).retry_after_s
        return -1.0 if retry_after_s is None or retry_after_s == float("inf") else retry_after_s

    def end(self, code: int, message: str) -> None:
        self.is_done, self.connection = True, None
        self.code, self.message = code, message
        self.ended()

    def headers(self, head: ResponseHead) -> None:
        self._head = head

    def received(self, data: bytes) -> None:
        if not self._body:
            self._body = data
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += data
        if len(self._body) > MAX_BODY_BYTES:
            self._abandon(
                RESOURCE_EXHAUSTED, f"the answer is longer than {MAX_MESSAGE_BYTES:,} bytes"
            )

    def response_ended(self, trailers: ResponseHead) -> None:
        self.is_done, self.connection = True, None
        head = self._head or trailers
        if trailers.is_ok and head.is_grpc:
            self._read_answer()
        else:
            self.trailers = trailers
            self.code, self.message = _status_of(head, trailers)
        self.ended()

    def failed(self, code: int | None, why: str) -> None:
        self.end(UNAVAILABLE if code is None else CODE_OF_RESET.get(code, INTERNAL), why)

    def _abandon(self, code: int, why: str) -> None:
        assert self.connection is not None
        self.connection.reset(self)
        self.end(code, why)

    def _read_answer(self) -> None:
        body = self._body
        length = len(body) - MESSAGE_HEAD_BYTES
        if int.from_bytes(body[:MESSAGE_HEAD_BYTES], "big") == length:
            self.answer = bytes(body[MESSAGE_HEAD_BYTES:])
            return
        self.code = INTERNAL
        if length >= 0 and int.from_bytes(body[1:MESSAGE_HEAD_BYTES], "big") == length:
            self.message = "the answer is compressed without being asked to"
        else:
            self.message = "the answer is not one whole message"


def _status_of(head: ResponseHead, trailers: ResponseHead) -> tuple[int, str]:
    """Status and message of a response that is not a success."""
    status = trailers.grpc_status
    if status is not None:
        code = int(status) if status.isascii() and status.isdigit() and len(status) < 4 else -1
        if code == OK:
            return UNKNOWN, f"the answer has the content type {head.content_type!r}"
        if code not in CODES:
            return UNKNOWN, f"the status is {status!r}: {trailers.message}"
        return code, trailers.message
    if head.status != "200":
        code = CODE_OF_HTTP_STATUS.get(head.status, UNKNOWN)
        return code, f"the answer has the HTTP status {head.status}"
    if not head.is_grpc:
        return UNKNOWN, f"the answer has the content type {head.content_type!r}"
    return UNKNOWN, "the answer ended without a status"
