"""The first bytes of a connection, by which a client shows that it speaks HTTP/2."""

from __future__ import annotations

import re

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP1_ANSWER = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\n"
    b"content-type: text/plain\r\nconnection: close\r\n\r\n"
    b"This port speaks gRPC, over HTTP/2. REST, /metrics and /readyz are at the HTTP port.\n"
)
HTTP1_REQUEST = re.compile(rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|CONNECT|PRI)\b")
TLS_FIRST_BYTES = b"\x16\x03"  # a handshake record of SSL 3 or TLS


class OtherProtocol(Exception):
    """The client speaks something else; `answer` is for it, and may be empty."""

    def __init__(self, answer: bytes, *, is_tls: bool) -> None:
        super().__init__("not HTTP/2")
        self.answer = answer
        self.is_tls = is_tls


class PrefaceReader:
    """Collects the connection preface."""

    def __init__(self) -> None:
        self._received = b""

    def read(self, data: bytes) -> bytes:
        """The bytes from the preface on, once it is complete; else none. Raises OtherProtocol."""
        data = self._received + data
        if not data.startswith(PREFACE[: len(data)]):
            answer = HTTP1_ANSWER if HTTP1_REQUEST.match(data) else b""
            raise OtherProtocol(answer, is_tls=data.startswith(TLS_FIRST_BYTES))
        if len(data) < len(PREFACE):
            self._received = data
            return b""
        return data
