"""Fixtures of the client's tests."""

import socket

import pytest


@pytest.fixture
def unused_target() -> str:
    """A target without a server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"
