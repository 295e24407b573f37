"""The other end of a connection: its address, and the certificate it has proven to own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any, NamedTuple

UNIX = "unix"  # host of a peer on a Unix socket

Names = Iterable[tuple[str, str]]  # (kind, value), as the ssl module gives them


class PeerCertificate(NamedTuple):
    """The names in a client's certificate, which a CA of `--tls-client-ca` has signed."""

    common_name: str  # empty if the subject has none, or several
    dns_names: tuple[str, ...]
    uris: tuple[str, ...]


class Peer(NamedTuple):
    """The other end of a connection."""

    host: str  # IP address, or "unix"; empty if the peer has already left
    is_local: bool  # on this machine: loopback address or Unix socket
    certificate: PeerCertificate | None  # None without TLS, or if the client sent none


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """The peer of a connection. The names it proves are fixed when the TLS handshake ends."""
    tls: Any = transport.get_extra_info("ssl_object")
    certificate = None if tls is None else certificate_of(tls.getpeercert())
    return Peer(*address_of(transport), certificate)


def address_of(transport: asyncio.BaseTransport) -> tuple[str, bool]:
    """The host of a connection's peer, and whether it is on this machine. See Peer."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_UNIX:
        return UNIX, True
    address = transport.get_extra_info("peername")
    return _plain_address(address[0]) if isinstance(address, tuple) else ("", False)


def certificate_of(fields: Mapping[str, Any] | None) -> PeerCertificate | None:
    """The names of a verified certificate, from SSLObject.getpeercert()."""
    if not fields:
        return None
    subject = [pair for part in fields.get("subject", ()) for pair in part]
    common_names = _values(subject, "commonName")
    alternatives: Names = fields.get("subjectAltName", ())
    return PeerCertificate(
        common_name=common_names[0] if len(common_names) == 1 else "",
        dns_names=_values(alternatives, "DNS"),
        uris=_values(alternatives, "URI"),
    )


def _values(names: Names, kind: str) -> tuple[str, ...]:
    return tuple(value for name, value in names if name == kind)


@lru_cache(maxsize=1024)  # a flood of connections comes from few addresses
def _plain_address(text: str) -> tuple[str, bool]:
    """An IPv4 address that arrived at an IPv6 socket becomes IPv4 again, so that rules match."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address), address.is_loopback
