"""Connections are limited in all and by peer; what is cut is counted and logged."""

from __future__ import annotations

import logging
from collections import Counter
from ipaddress import ip_network

import pytest

from server.settings import Settings
from server.transport import connection_limits
from server.transport.connection_limits import GRPC, HTTP, ConnectionLimits


def limits(
    most: int = 100,
    per_peer: int = 100,
    *trusted: str,
    cuts: Counter[tuple[str, str]] | None = None,
) -> ConnectionLimits:
    counted: Counter[tuple[str, str]] = Counter() if cuts is None else cuts

    def on_cut(port: str, reason: str) -> None:
        counted[port, reason] += 1

    return ConnectionLimits(most, per_peer, [ip_network(name) for name in trusted], on_cut)


def test_the_ports_share_the_limit_in_all() -> None:
    cuts: Counter[tuple[str, str]] = Counter()
    shared = limits(2, cuts=cuts)
    assert shared.admit(GRPC, "10.0.0.1") == ""
    assert shared.admit(HTTP, "10.0.0.2") == ""
    assert shared.open() == {GRPC: 1, HTTP: 1}
    for _ in range(3):  # refused connections take no place
        assert shared.admit(HTTP, "10.0.0.3") == "max_connections"
    shared.release(GRPC, "10.0.0.1")
    assert shared.admit(HTTP, "10.0.0.3") == ""
    assert cuts == {(HTTP, "max_connections"): 3}


def test_one_peer_cannot_take_all_connections() -> None:
    shared = limits(100, 2)
    assert [shared.admit(HTTP, "10.0.0.1") for _ in range(3)] == [
        "",
        "",
        "max_connections_per_peer",
    ]
    assert shared.admit(HTTP, "10.0.0.2") == ""
    shared.release(HTTP, "10.0.0.1")
    assert shared.admit(GRPC, "10.0.0.1") == ""


def test_all_addresses_of_one_ipv6_network_are_one_peer() -> None:
    shared = limits(100, 2)
    assert shared.admit(HTTP, "2001:db8:1:2::1") == ""
    assert shared.admit(HTTP, "2001:db8:1:2:ffff::9") == ""
    assert shared.admit(HTTP, "2001:db8:1:2::3") != ""
    assert shared.admit(HTTP, "2001:db8:1:3::1") == ""


def test_proxies_and_unix_sockets_have_no_limit_by_peer() -> None:
    shared = limits(10, 1, "10.0.0.0/8", "::1/128")
    for host in ("10.9.8.7", "::1", "unix"):
        for _ in range(3):
            assert shared.admit(GRPC, host) == ""
        for _ in range(3):
            shared.release(GRPC, host)
    assert shared.open() == {GRPC: 0, HTTP: 0}
    assert shared.admit(HTTP, "11.0.0.1") == ""
    assert shared.admit(HTTP, "11.0.0.1") != ""


def test_cuts_are_logged_at_most_once_a_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 100.0
    monkeypatch.setattr(connection_limits, "clock", lambda: now_s)
    cuts: Counter[tuple[str, str]] = Counter()
    shared = limits(cuts=cuts)
    with caplog.at_level(logging.WARNING):
        for _ in range(500):
            shared.cut(HTTP, "invalid_request", "10.0.0.1")
        now_s += 1.0
        shared.cut(GRPC, "resets", "10.0.0.2")
    lines = [(record.getMessage(), vars(record)["left_out"]) for record in caplog.records]
    assert lines == [("connection_cut", 0), ("connection_cut", 499)]
    assert cuts == {(HTTP, "invalid_request"): 500, (GRPC, "resets"): 1}


def test_trusted_peers_are_addresses_and_networks() -> None:
    networks = Settings(trusted_peers="10.0.0.7, 10.1.2.3/16,::1").trusted_networks()
    assert [str(network) for network in networks] == ["10.0.0.7/32", "10.1.0.0/16", "::1/128"]
    with pytest.raises(ValueError, match="trusted_peers has 'envoy'; an address such as"):
        Settings(trusted_peers="10.0.0.7,envoy")
