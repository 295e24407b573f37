"""The server runs under uvloop, whose transports differ from asyncio's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import uvloop

from tests.transport import test_frames, test_grpcio_client, test_h2_client


def test_the_transport_works_under_uvloop() -> None:
    tests: list[Callable[[], Any]] = [
        test_frames.test_the_server_stops_reading_from_a_client_that_does_not_read,
        test_frames.test_a_tls_handshake_closes_the_connection,
        test_frames.test_a_lost_connection_ends_its_calls,
        test_grpcio_client.test_large_streams_are_answered_in_order,
        test_h2_client.test_a_stopping_server_sends_goaway_and_answers_calls_in_progress,
        lambda: test_h2_client.test_the_server_respects_the_clients_windows(1000),
        lambda: test_frames.test_an_http1_client_is_pointed_to_the_http_port(
            b"GET / HTTP/1.1\r\n\r\n"
        ),
        *(
            lambda name=name: test_frames.test_a_protocol_error_closes_its_own_connection_only(name)
            for name in test_frames.FAULTS
        ),
    ]
    for test in tests:
        uvloop.run(test())
