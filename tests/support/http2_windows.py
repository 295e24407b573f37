"""The windows that a server grants to a client (RFC 9113, 5.2)."""

from __future__ import annotations

from tests.support.http2_frames import ACK, INITIAL_WINDOW_SIZE, SETTINGS, WINDOW_UPDATE, frame

DEFAULT_WINDOW = 65_535


class Windows:
    """How much of the bodies the server lets through (RFC 9113, 5.2)."""

    def __init__(self) -> None:
        self._buffer = b""
        self._initial = DEFAULT_WINDOW
        self._connection = DEFAULT_WINDOW
        self._streams: dict[int, int] = {}  # change from the initial window
        self._unacknowledged = 0

    def left(self, stream: int) -> int:
        return max(0, min(self._connection, self._initial + self._streams.get(stream, 0)))

    def acknowledgements(self) -> list[bytes]:
        """The server's windows hold once its settings are acknowledged."""
        number, self._unacknowledged = self._unacknowledged, 0
        return [frame(SETTINGS, ACK)] * number

    def use(self, stream: int, size: int) -> None:
        self._connection -= size
        self._streams[stream] = self._streams.get(stream, 0) - size

    def read(self, data: bytes) -> None:
        data = self._buffer + data
        start = 0
        while start + 9 <= len(data):
            end = start + 9 + int.from_bytes(data[start : start + 3], "big")
            if end > len(data):
                break
            kind, flags = data[start + 3], data[start + 4]
            stream, payload = (
                int.from_bytes(data[start + 5 : start + 9], "big"),
                data[start + 9 : end],
            )
            if kind == WINDOW_UPDATE:
                self._open(stream, int.from_bytes(payload, "big"))
            elif kind == SETTINGS and not flags & ACK:
                self._unacknowledged += 1
                for place in range(0, len(payload), 6):
                    if int.from_bytes(payload[place : place + 2], "big") == INITIAL_WINDOW_SIZE:
                        self._initial = int.from_bytes(payload[place + 2 : place + 6], "big")
            start = end
        self._buffer = data[start:]

    def _open(self, stream: int, size: int) -> None:
        if stream:
            self._streams[stream] = self._streams.get(stream, 0) + size
        else:
            self._connection += size
