"""HTTP/1.1 by h11, and what it leaves open: limits, and requests that proxies may read otherwise.

h11 is strict, which protects from request smuggling, and slow: 1 KB of the worst input takes 1 ms,
4 KB of empty header fields take 4 ms. So a connection feeds it small pieces.
"""

from __future__ import annotations

from http import HTTPStatus

import h11

MAX_HEAD_BYTES = 16 << 10  # of a request; the trailer of a chunked body may be as long
MAX_HEADERS = 100
VERSIONS = (b"1.0", b"1.1")

# Each chunk costs 8 us. Senders that split into small chunks use a few hundred bytes or more.
FREE_CHUNKS = 1024
MIN_CHUNK_BYTES = 32  # on average, in a body with more chunks

SMALL_CHUNKS = "small_chunks"
INVALID = "invalid_request"

DETAILS = {
    HTTPStatus.BAD_REQUEST: "the request is not valid HTTP/1.1",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"the head of the request has more than {MAX_HEAD_BYTES:,} bytes"
    ),
    HTTPStatus.NOT_IMPLEMENTED: "a Transfer-Encoding is given; only chunked is understood",
}


class RequestError(h11.RemoteProtocolError):
    """A request that is refused although h11 accepts it; the message says why."""

    def __init__(self, status: HTTPStatus, detail: str, reason: str = INVALID) -> None:
        super().__init__(detail, error_status_hint=status)
        self.reason = reason


class Http1Parser(h11.Connection):
    """The server's side of one HTTP/1.1 connection."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self.error: h11.RemoteProtocolError | None = None  # why the connection is unusable
        self.body_left = 0  # bytes of the body to come; 0 if the body is chunked
        self._chunks = 0  # of the current body, or parts of chunks
        self._chunk_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
            if isinstance(event, h11.Data):
                self._count_data(len(event.data))
            elif isinstance(event, h11.Request):
                self._begin(event)
        except h11.RemoteProtocolError as error:
            self.error = error
            raise
        return event

    def _begin(self, request: h11.Request) -> None:
        """Raises RequestError."""
        if request.http_version not in VERSIONS:
            raise RequestError(
                HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
                "this port speaks HTTP/1.1; gRPC and HTTP/2 have a port of their own",
            )
        check_headers(len(request.headers))
        length, is_chunked = 0, False
        for name, value in request.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
        # RFC 9112, 6.1: proxies disagree on where such a body ends.
        if is_chunked and (length or request.http_version == b"1.0"):
            other = "Content-Length" if length else "HTTP/1.0"
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"Transfer-Encoding may not come with {other}"
            )
        self.body_left = length
        self._chunks = self._chunk_bytes = 0

    def _count_data(self, size: int) -> None:
        """Raises RequestError for a body of many tiny chunks."""
        if self.body_left:
            self.body_left -= size
            return
        self._chunks += 1
        self._chunk_bytes += size
        if self._chunks > FREE_CHUNKS and self._chunk_bytes < MIN_CHUNK_BYTES * self._chunks:
            raise RequestError(
                HTTPStatus.BAD_REQUEST,
                f"the body has {self._chunks:,} chunks of less than {MIN_CHUNK_BYTES} bytes on "
                "average; send larger ones",
                SMALL_CHUNKS,
            )


def check_headers(count: int) -> None:
    """Raises RequestError for too many header fields."""
    if count > MAX_HEADERS:
        raise RequestError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request has more than {MAX_HEADERS} header fields",
        )
