"""Random bytes and frames never raise, and leave no stream, task or counted byte behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.transport.calls.messages import MessageReader
from server.transport.compression import Inflater
from server.transport.grpc_server import GrpcServer
from server.transport.methods import Method, StreamingMethod, UnaryMethod
from tests.support.http2_peers import (
    HELLO,
    LIMITS,
    Bare,
    frame,
    headers,
    message,
)

NOISE = st.one_of(
    st.binary(max_size=40),
    st.builds(
        frame,
        st.integers(0, 12),
        st.sampled_from([0, 1, 4, 5, 8, 9, 12, 13, 32, 36, 37, 45, 255]),
        st.integers(0, 9),
        st.one_of(
            st.binary(max_size=30),
            st.just(headers()),
            st.just(headers(path="/test/Each")),
            st.just(headers(path="/test/Never", grpc_timeout="1m")),
            st.just(message(b"abc")),
            st.just(message(b"abc") + b"\0\0"),
        ),
    ),
)


class Nowhere(asyncio.Transport):
    """A transport that discards all output."""

    closed = False

    def write(self, data: Any) -> None:
        assert data

    def close(self) -> None:
        self.closed = True

    abort = close
    write_eof = close

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@settings(max_examples=300, deadline=None)
@given(st.lists(NOISE, max_size=12), st.integers(1, 60))
def test_random_frames_raise_nothing_and_leave_nothing(noise: list[bytes], size: int) -> None:
    async def run() -> None:
        failures: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        one = Bare()
        methods: dict[str, Method] = {
            "/test/Echo": UnaryMethod(one.echo),
            "/test/Each": StreamingMethod(one.each),
            "/test/Never": UnaryMethod(one.never),
        }
        inflater = Inflater()
        server = GrpcServer(methods, LIMITS, inflater)
        connection = server._new_connection()
        transport = Nowhere()
        connection.connection_made(transport)
        data = HELLO + b"".join(noise)
        for at in range(0, len(data), size):
            connection.data_received(data[at : at + size])
            if at % 5 == 0:
                await asyncio.sleep(0)
        connection.connection_lost(None)
        await server.stop(None)
        inflater.__exit__()
        for _ in range(5):
            await asyncio.sleep(0)
        assert server.receiving_bytes == 0
        assert not connection.streams
        assert not failures
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 20_000)), max_size=20))
def test_pieces_of_a_message_hold_little_more_than_their_bytes(cuts: list[tuple[int, int]]) -> None:
    """A large piece is kept without a copy. A small one is copied: otherwise a few bytes would keep
    a whole chunk alive, with data of other streams."""
    reader = MessageReader("", 1 << 30)
    expected, draw = b"", random.Random(0)
    for size, around in cuts:
        data = draw.randbytes(around) + draw.randbytes(size) + draw.randbytes(around // 2)
        reader._keep(data, around, around + size)
        expected += data[around : around + size]
    pieces = reader._pieces
    assert b"".join(pieces) == expected
    held = [memoryview(one.obj if isinstance(one, memoryview) else one) for one in pieces]
    assert sum(map(len, held)) <= 2 * len(expected)
