"""Listening sockets: TCP, or Unix sockets for clients on the same machine."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address
from pathlib import Path

from server.errors import CannotServe

# A client that vanished without closing its connection is noticed after two minutes.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # seconds, seconds, times

# Connections that wait to be accepted; the system may allow fewer. Above it the kernel ignores new
# ones, and their clients try again after a second. More would not help: the event loop accepts all
# that wait in one turn, at 0.1 ms each.
BACKLOG = 1024

MAX_UNIX_PATH_BYTES = 107  # the kernel's limit


@contextmanager
def listening(host: str, port: int, unix_socket: str = "") -> Iterator[socket.socket]:
    """A socket that listens on a Unix path if one is given, else on an address.

    Port 0 takes a free one. Raises CannotServe.
    """
    if unix_socket:
        with _unix_listener(Path(unix_socket)) as listener:
            yield listener
    else:
        with _tcp_listener(host, port) as listener:
            yield listener


def port_of(listener: socket.socket) -> int:
    """The port; 0 for a Unix socket."""
    return 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])


def address_fields(listener: socket.socket, prefix: str = "") -> dict[str, str | int]:
    """Where the socket listens, for the log: its port, or its path."""
    if listener.family == socket.AF_UNIX:
        return {f"{prefix}unix_socket": listener.getsockname()}
    return {f"{prefix}port": port_of(listener)}


@contextmanager
def _tcp_listener(host: str, port: int) -> Iterator[socket.socket]:
    name = _name_of(host)
    address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    try:
        # The first address of a name. An empty host is all addresses.
        found = socket.getaddrinfo(
            name or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, where = found[0]
        # asyncio turns Nagle's algorithm off only for sockets with an explicit protocol. With the
        # algorithm on, a response takes 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise CannotServe(f"can't listen on {address}: {_reason(error)}") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                if hasattr(socket, option):
                    listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            if family == socket.AF_INET6:  # [::] takes IPv4 too, whatever the system's default is
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(where)
            listener.listen(BACKLOG)  # at once: no client is refused before the servers start
        except OSError as error:
            raise CannotServe(f"can't listen on {address}: {_reason(error)}") from None
        yield listener


def _name_of(host: str) -> str:
    """The host without brackets. Raises CannotServe for what looks like a host and something."""
    name = host.strip()
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if name.startswith("unix:"):
        raise CannotServe(
            f"host is {host!r}; use --unix-socket and --http-unix-socket for Unix sockets"
        )
    if ":" in name:
        try:
            IPv6Address(name)
        except ValueError:
            raise CannotServe(
                f"host is {host!r}; an address or a name without a port is needed: --port and "
                "--http-port set the ports"
            ) from None
    return name


@contextmanager
def _unix_listener(path: Path) -> Iterator[socket.socket]:
    """Removes the socket of a server that has crashed first, and its own at the end."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise CannotServe(
            f"the path of the Unix socket {path} is too long: at most {MAX_UNIX_PATH_BYTES} bytes "
            "are allowed"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            _remove_stale(path)
            listener.bind(str(path))
            listener.listen(BACKLOG)
            own = path.stat()
        except OSError as error:
            raise CannotServe(f"can't listen on {path}: {_reason(error)}") from None
        try:
            yield listener
        finally:
            with suppress(OSError):  # another server may have replaced it
                if os.path.samestat(path.stat(), own):
                    path.unlink()


def _remove_stale(path: Path) -> None:
    """Removes a socket that no process listens on. Raises CannotServe for anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotServe(f"can't listen on {path}: the file exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise CannotServe(f"can't listen on {path}: another server listens there")


def _reason(error: OSError | UnicodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
