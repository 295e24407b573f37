"""Limits on the connections of all ports: how many are open, and why the server cuts one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from server.security.peer import UNIX
from server.telemetry.clock import clock

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 1.0
IPV6_PREFIX = 64  # bits; one user usually has all addresses behind them

GRPC, HTTP = PORTS = ("grpc", "http")

TOO_MANY = "max_connections"
TOO_MANY_OF_PEER = "max_connections_per_peer"
SPEAKS_TLS = "client_speaks_tls"  # on a port without TLS

Network = IPv4Network | IPv6Network


class ConnectionLimits:
    """Counts open connections, in all and by peer. All ports share one object.

    Peers in `trusted` networks, such as proxies, and those on Unix sockets have no limit of their
    own. Every `admit` that returns an empty text needs one `release`. Used on the event loop's
    thread only.
    """

    def __init__(
        self,
        max_connections: int,
        max_per_peer: int,
        trusted: Sequence[Network],
        on_cut: Callable[[str, str], None],
    ) -> None:
        """`on_cut` counts a connection that is refused or cut, by port and reason."""
        self._max_connections = max_connections
        self._max_per_peer = max_per_peer
        self._trusted = tuple(trusted)
        self._on_cut = on_cut
        self._open: dict[str, int] = dict.fromkeys(PORTS, 0)
        self._all_open = 0
        self._by_peer: Counter[str] = Counter()  # those that are not trusted
        self._next_line_s = 0.0
        self._lines_left_out = 0

    def open(self) -> dict[str, int]:
        """Open connections by port."""
        return dict(self._open)

    def is_trusted(self, host: str) -> bool:
        """Whether a peer, an address or "unix", has no limits by peer."""
        if host == UNIX:
            return True
        if not host or not self._trusted:
            return False
        address = ip_address(host)
        return any(address in network for network in self._trusted)

    def admit(self, port: str, host: str) -> str:
        """Counts a new connection. Returns why it must be closed instead; empty if it may stay."""
        if self._all_open >= self._max_connections:
            return self._refuse(port, TOO_MANY, host)
        if not self.is_trusted(host):
            peer = peer_key(host)
            if self._by_peer[peer] >= self._max_per_peer:
                return self._refuse(port, TOO_MANY_OF_PEER, host)
            self._by_peer[peer] += 1
        self._open[port] += 1
        self._all_open += 1
        return ""

    def release(self, port: str, host: str) -> None:
        """Forgets a connection that was admitted."""
        self._open[port] -= 1
        self._all_open -= 1
        if not self.is_trusted(host):
            peer = peer_key(host)
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]

    def cut(self, port: str, reason: str, host: str) -> None:
        """Counts a connection that is refused or cut, and logs it, at most one a second.

        `port` is one of PORTS, and `reason` comes from a closed set.
        """
        self._on_cut(port, reason)
        now_s = clock()
        if now_s < self._next_line_s:
            self._lines_left_out += 1
            return
        extra = {"port": port, "reason": reason, "peer": host, "left_out": self._lines_left_out}
        log.warning("connection_cut", extra=extra)
        self._next_line_s = now_s + LOG_INTERVAL_S
        self._lines_left_out = 0

    def _refuse(self, port: str, reason: str, host: str) -> str:
        self.cut(port, reason, host)
        return reason


def no_limits() -> ConnectionLimits:
    """Limits that admit every connection and count nothing outside."""
    return ConnectionLimits(1 << 31, 1 << 31, (), lambda port, reason: None)


def peer_key(host: str) -> str:
    """The address that is limited: of an IPv6 address only its network."""
    if ":" not in host:
        return host
    return str(ip_network((host, IPV6_PREFIX), strict=False))
