"""The auth file (TOML): principals, their credentials, their permissions and quotas.

Errors name the field, never the value of a field that may hold a secret.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from server.security.peer import UNIX, Peer, PeerCertificate
from server.security.principal import ALL_MODELS, RESERVED_NAMES, Principal, Role

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
CERTIFICATE = re.compile(r"(CN|DNS|URI):(.+)")
HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
MAX_BYTES = 16 << 20

Positive = Annotated[float, Meta(gt=0)]
Weight = Annotated[float, Meta(gt=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]

T = TypeVar("T", bound=Struct)


class InvalidAuthFile(Exception):
    """The file can't be used; the message says where and why."""


class PrincipalTable(Struct, forbid_unknown_fields=True, kw_only=True):
    """[principals.NAME]"""

    roles: Annotated[list[Role], Meta(min_length=1)]
    models: Annotated[tuple[Text, ...], Meta(min_length=1)] = ALL_MODELS
    certificates: tuple[Text, ...] = ()
    proxy_users: tuple[Text, ...] = ()
    images_per_s: Positive | None = None
    burst: Annotated[float, Meta(ge=1)] | None = None
    max_calls: Count | None = None
    weight: Weight = 1.0


class TokenTable(Struct, forbid_unknown_fields=True, kw_only=True):
    """[[tokens]]"""

    principal: str
    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    expires: Annotated[datetime, Meta(tz=True)] | None = None


class ProxyTable(Struct, forbid_unknown_fields=True, kw_only=True):
    """[proxy]"""

    header: Text
    addresses: Annotated[list[Text], Meta(min_length=1)]


class AuthTable(Struct, forbid_unknown_fields=True, kw_only=True):
    """The whole file. The tables in it are converted one by one, so that errors can name them."""

    principals: dict[str, dict[str, Any]] = {}
    tokens: list[dict[str, Any]] = []
    proxy: ProxyTable | None = None


@dataclass(frozen=True, slots=True)
class StoredToken:
    """What the server knows about a token."""

    principal: Principal
    digest: bytes
    expires_s: float  # Unix time; infinite if it does not expire


@dataclass(frozen=True, slots=True)
class TrustedProxy:
    """A proxy that has authenticated the caller and names it in a header."""

    header: bytes
    networks: tuple[IPv4Network | IPv6Network, ...]
    has_unix_socket: bool
    users: Mapping[bytes, Principal]

    def trusts(self, peer: Peer) -> bool:
        if peer.host == UNIX:
            return self.has_unix_socket
        if not peer.host:
            return False
        address = ip_address(peer.host)
        return any(address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Identities:
    """The content of an auth file, ready for lookups."""

    principals: Mapping[str, Principal]
    tokens: Mapping[str, StoredToken]  # by id
    certificates: Mapping[str, Principal]  # by name with its kind, as "DNS:client.example"
    proxy: TrustedProxy | None

    def principals_of(self, certificate: PeerCertificate) -> set[Principal]:
        """All principals that a name in the certificate belongs to."""
        known = self.certificates
        return {known[name] for name in certificate_names(certificate) if name in known}


def certificate_names(certificate: PeerCertificate) -> Iterator[str]:
    """The names with their kinds, as they stand in the auth file."""
    if certificate.common_name:
        yield f"CN:{certificate.common_name}"
    yield from (f"DNS:{name.lower()}" for name in certificate.dns_names)
    yield from (f"URI:{uri}" for uri in certificate.uris)


def parse_auth_file(data: bytes) -> Identities:
    """Raises InvalidAuthFile."""
    if len(data) > MAX_BYTES:
        raise InvalidAuthFile(f"has {len(data):,} bytes; at most {MAX_BYTES:,} are allowed")
    try:
        raw = msgspec.toml.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        raise InvalidAuthFile(f"is not TOML: {error}") from None
    file = _converted(raw, AuthTable, "")
    if not file.principals:
        raise InvalidAuthFile("has no table under principals, so nobody could call")
    tables = {
        name: _converted(table, PrincipalTable, f"principals.{_checked_name(name)}: ")
        for name, table in file.principals.items()
    }
    principals = {name: _principal(name, table) for name, table in tables.items()}
    return Identities(
        principals,
        _tokens(file.tokens, principals),
        _certificates(tables, principals),
        _proxy(file.proxy, tables, principals),
    )


def _converted(raw: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InvalidAuthFile(f"{where}{error}".replace("$.", "")) from None


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise InvalidAuthFile(
            f"principals: {name[:20]!r} is not a name; 1 to 64 letters, digits and . _ @ - are "
            f"allowed, and not {' or '.join(sorted(RESERVED_NAMES))}"
        )
    return name


def _principal(name: str, table: PrincipalTable) -> Principal:
    rate = math.inf if table.images_per_s is None else table.images_per_s
    return Principal(
        name=name,
        roles=frozenset(table.roles),
        models=table.models,
        images_per_s=rate,
        burst=max(1.0, rate) if table.burst is None else table.burst,
        max_calls=table.max_calls,
        weight=table.weight,
    )


def _tokens(
    tables: list[dict[str, Any]], principals: Mapping[str, Principal]
) -> dict[str, StoredToken]:
    tokens: dict[str, StoredToken] = {}
    for index, raw in enumerate(tables):
        where = f"tokens[{index}]: "
        table = _converted(raw, TokenTable, where)
        principal = principals.get(table.principal)
        if principal is None:
            raise InvalidAuthFile(f"{where}principal names no table under principals")
        if table.id in tokens:
            raise InvalidAuthFile(f"{where}an earlier token has the same id")
        expires_s = math.inf if table.expires is None else table.expires.timestamp()
        tokens[table.id] = StoredToken(principal, bytes.fromhex(table.sha256), expires_s)
    return tokens


def _certificates(
    tables: Mapping[str, PrincipalTable], principals: Mapping[str, Principal]
) -> dict[str, Principal]:
    found: dict[str, Principal] = {}
    for name, table in tables.items():
        for index, text in enumerate(table.certificates):
            where = f"principals.{name}: certificates[{index}] "
            parts = CERTIFICATE.fullmatch(text)
            if parts is None:
                raise InvalidAuthFile(f"{where}must be CN:NAME, DNS:NAME or URI:NAME")
            kind, value = parts.groups()
            key = f"{kind}:{value.lower() if kind == 'DNS' else value}"
            if key in found:
                raise InvalidAuthFile(f"{where}also belongs to principals.{found[key].name}")
            found[key] = principals[name]
    return found


def _proxy(
    proxy: ProxyTable | None,
    tables: Mapping[str, PrincipalTable],
    principals: Mapping[str, Principal],
) -> TrustedProxy | None:
    users: dict[bytes, Principal] = {}
    for name, table in tables.items():
        for index, user in enumerate(table.proxy_users):
            where = f"principals.{name}: proxy_users[{index}] "
            if proxy is None:
                raise InvalidAuthFile(f"{where}needs the table proxy, with header and addresses")
            key = user.encode("utf-8")
            if key in users:
                raise InvalidAuthFile(f"{where}also belongs to principals.{users[key].name}")
            users[key] = principals[name]
    if proxy is None:
        return None
    header = proxy.header.lower()
    if not HEADER.fullmatch(header) or header == "authorization":
        raise InvalidAuthFile("proxy: header must be the name of a header, and not authorization")
    networks = []
    for index, address in enumerate(proxy.addresses):
        if address == UNIX:
            continue
        try:
            networks.append(ip_network(address, strict=False))
        except ValueError:
            raise InvalidAuthFile(
                f"proxy: addresses[{index}] must be an IP address, a network such as 10.0.0.0/8, "
                f"or {UNIX!r}"
            ) from None
    has_unix = UNIX in proxy.addresses
    return TrustedProxy(header.encode("ascii"), tuple(networks), has_unix, users)
