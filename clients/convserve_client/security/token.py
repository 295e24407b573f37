"""Bearer tokens (RFC 6750): checks them, and keeps them off connections that others can read."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address

from convserve_client.security.connection_errors import host_of

Token = str | Callable[[], str]
"""A token, or a function that returns the current one, for tokens that are renewed."""

VALID = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, 2.1
METADATA_KEY = "authorization"


def bearer(token: str) -> str:
    """The value of the `authorization` header. Raises ValueError, without the token."""
    if not VALID.fullmatch(token):
        raise ValueError(
            "the token is empty, or has characters that no token may have; give the token alone,"
            " without the word Bearer and without quotes"
        )
    return "Bearer " + token


def current(token: Token) -> str:
    return token() if callable(token) else token


def check_secrecy(target: str, *, has_tls: bool, allow_plaintext: bool) -> None:
    """Raises ValueError if others could read a token on its way to the target."""
    if not (has_tls or allow_plaintext or is_local(target)):
        raise ValueError(
            f"a token would cross the network to {target} unencrypted: use TLS, or allow it on a"
            " network that you trust (allow_plaintext_token, --allow-plaintext-token)"
        )


def is_local(target: str) -> bool:
    """Whether the target is on this machine: a Unix socket, or a loopback address."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = host_of(target)
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
