"""Limits wrong credentials by address, without looking anything up and without sleeping."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from server.security.peer import UNIX

WINDOW_S = 60.0
MAX_ADDRESSES = 4096  # about 1 MB; the address that failed longest ago is forgotten first
IPV6_PREFIX = 64  # bits; one customer usually has all addresses of such a network


class FailureLimit:
    """Counts failures per address and minute; 0 allows any number.

    Peers in `trusted` networks, such as proxies with many users behind them, have no limit. Used on
    the event loop's thread only.
    """

    def __init__(self, per_minute: int, trusted: Sequence[IPv4Network | IPv6Network] = ()) -> None:
        self._per_minute = per_minute
        self._trusted = trusted
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()  # start, failures

    def wait_s(self, host: str) -> float:
        """Seconds until credentials from this address are looked at again; 0 if they are now."""
        if not self._windows or not self._per_minute:
            return 0.0
        window = self._windows.get(_network(host))
        if window is None or window[1] < self._per_minute:
            return 0.0
        return max(0.0, window[0] + WINDOW_S - time.monotonic())

    def failed(self, host: str) -> None:
        if not self._per_minute or self._is_trusted(host):
            return
        key, now_s = _network(host), time.monotonic()
        start_s, failures = self._windows.pop(key, (now_s, 0))
        if now_s >= start_s + WINDOW_S:
            start_s, failures = now_s, 0
        self._windows[key] = start_s, failures + 1
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)

    def _is_trusted(self, host: str) -> bool:
        if not self._trusted or host in ("", UNIX):
            return False
        address = ip_address(host)
        return any(address in network for network in self._trusted)


def _network(host: str) -> str:
    """The address, or the network of an IPv6 address."""
    try:
        address = ip_address(host)
    except ValueError:  # a Unix socket
        return host
    if isinstance(address, IPv6Address):
        return str(ip_network((address, IPV6_PREFIX), strict=False))
    return host
