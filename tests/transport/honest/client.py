"""A gRPC client that decides itself how its bytes go out: when, and in how many frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from hpack import Decoder

from tests.support.http2_frames import (
    ACK,
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    HELLO,
    OPEN_WINDOWS,
    PING,
    RST_STREAM,
    SETTINGS,
    frame,
    message,
    request_block,
    reset,
)
from tests.support.http2_windows import Windows

LARGEST_FRAME = 16_384
READ_BYTES = 1 << 18
CANCELLED = 1  # the gRPC status of a call that the server resets with CANCEL
MAX_STREAMS = 256  # at a time, what the server allows by default


class Cut(Exception):
    """The server ended the connection, or sent GOAWAY."""


@dataclass(frozen=True)
class Pace:
    """How a client sends the body of a call."""

    frame_bytes: int = LARGEST_FRAME
    pause_s: float = 0.0  # after each frame


FAST = Pace()


class Client:
    """One connection. Any number of coroutines may make calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder()
        self._windows = Windows()
        self._window_opened = asyncio.Event()
        self._call_ended = asyncio.Event()
        self._stream = -1
        self._statuses: dict[int, asyncio.Future[int]] = {}
        self._pings: dict[bytes, asyncio.Future[None]] = {}
        self._end = ""  # why the connection has ended
        self.received_bytes = 0  # of bodies

    async def call(
        self, path: str, data: bytes, *more: tuple[bytes, bytes], pace: Pace = FAST
    ) -> int:
        """The status of a call. Raises Cut."""
        stream, status = await self.begin(path, *more)
        body = message(data)
        for start in range(0, len(body), pace.frame_bytes):
            part = body[start : start + pace.frame_bytes]
            while self._windows.left(stream) < len(part):
                self._window_opened.clear()
                await self._window_opened.wait()
            self._windows.use(stream, len(part))
            is_last = start + len(part) == len(body)
            self._writer.write(frame(DATA, END_STREAM if is_last else 0, stream, part))
            if pace.pause_s:
                await asyncio.sleep(pace.pause_s)
        return await status

    async def begin(self, path: str, *more: tuple[bytes, bytes]) -> tuple[int, asyncio.Future[int]]:
        """Sends the headers of a call, once the server allows one more. Raises Cut."""
        while len(self._statuses) >= MAX_STREAMS and not self._end:
            self._call_ended.clear()
            await self._call_ended.wait()
        if self._end:
            raise Cut(self._end)
        self._stream += 2
        head = request_block(path, *more)
        self._writer.write(frame(HEADERS, END_HEADERS, self._stream, head))
        status = self._statuses[self._stream] = asyncio.get_running_loop().create_future()
        return self._stream, status

    def send(self, stream: int, data: bytes) -> None:
        """Sends a whole small body."""
        self._writer.write(frame(DATA, END_STREAM, stream, message(data)))

    def cancel(self, stream: int) -> None:
        self._statuses.pop(stream).cancel()
        self._call_ended.set()
        self._writer.write(reset(stream))

    async def ping(self, data: bytes) -> None:
        answered = self._pings[data] = asyncio.get_running_loop().create_future()
        self._writer.write(frame(PING, 0, 0, data))
        await answered

    async def read(self) -> None:
        """Reads until the server ends the connection; all calls that wait fail with Cut then."""
        end = "the server closed the connection"
        buffer = b""
        try:
            while data := await self._reader.read(READ_BYTES):
                self._windows.read(data)
                self._writer.write(b"".join(self._windows.acknowledgements()))
                self._window_opened.set()
                buffer += data
                start = 0
                while (stop := start + 9 + int.from_bytes(buffer[start : start + 3], "big")) <= len(
                    buffer
                ) and len(buffer) - start >= 9:
                    self._handle(buffer[start:stop])
                    start = stop
                buffer = buffer[start:]
                self._call_ended.set()
        except (Cut, ConnectionError) as error:
            end = str(error)
        self._end = end
        self._call_ended.set()
        waiting: list[asyncio.Future[Any]] = [*self._statuses.values(), *self._pings.values()]
        for one in waiting:
            if not one.done():
                one.set_exception(Cut(end))

    def _handle(self, received: bytes) -> None:
        kind, flags = received[3], received[4]
        stream, payload = int.from_bytes(received[5:9], "big"), received[9:]
        if kind == HEADERS:
            fields = dict(self._decoder.decode(payload, raw=True))
            if flags & END_STREAM and (status := self._statuses.pop(stream, None)):
                status.set_result(int(fields[b"grpc-status"]))
        elif kind == DATA:
            self.received_bytes += len(payload)
        elif kind == PING and flags & ACK:
            self._pings.pop(payload).set_result(None)
        elif kind == PING:
            self._writer.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            raise Cut(f"GOAWAY {payload!r}")
        elif kind == RST_STREAM and (status := self._statuses.pop(stream, None)):
            if int.from_bytes(payload, "big") == CANCEL:
                status.set_result(CANCELLED)
            else:
                status.set_exception(Cut(f"RST_STREAM {payload!r}"))
        else:
            assert kind in (SETTINGS, RST_STREAM, 8), kind


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = Client(reader, writer)
    writer.write(HELLO + OPEN_WINDOWS)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        writer.close()
        reading.cancel()
