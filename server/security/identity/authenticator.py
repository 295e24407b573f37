"""Finds the principal of a request from its headers and its connection."""

from __future__ import annotations

import hmac
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

from server.errors import Unauthenticated
from server.security.caller import Caller
from server.security.identity.auth_file import Identities
from server.security.identity.failure_limit import FailureLimit
from server.security.identity.tokens import token_of
from server.security.peer import Peer, PeerCertificate
from server.security.principal import LOCAL_CALLER, REMOTE_CALLER, Principal

AUTHORIZATION = b"authorization"

# Values of the label `reason` of convserve_auth_failures.
MISSING, MALFORMED, EXPIRED, LIMITED = "missing", "malformed", "expired", "limited"
UNKNOWN_TOKEN, UNKNOWN_CERTIFICATE = "unknown_token", "unknown_certificate"
UNKNOWN_USER, FORBIDDEN = "unknown_user", "forbidden"
FAILURES = (
    *(MISSING, MALFORMED, EXPIRED, LIMITED),
    *(UNKNOWN_TOKEN, UNKNOWN_CERTIFICATE, UNKNOWN_USER, FORBIDDEN),
)
GUESSES = frozenset({MALFORMED, UNKNOWN_TOKEN})  # the limit per address counts these

# A proxy on this machine forwards requests of other machines, and a browser those of web pages.
FORWARDING = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip", b"origin"})

MAX_VERIFIED = 4096  # Authorization values that are kept, about 2 MB
MAX_VERIFIED_BYTES = 100  # of one: "Bearer ", the token, and little more
NO_DIGEST = bytes(32)  # compared with for an unknown id, so that it takes as long as a known one

Headers = Iterable[tuple[bytes, bytes]]  # names in lower case


class Authenticator(ABC):
    """Used on the event loop's thread only."""

    @abstractmethod
    def relevant(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """The headers that `identify` looks at."""

    @abstractmethod
    def identify(self, relevant: list[tuple[bytes, bytes]], peer: Peer) -> Caller:
        """The caller. Raises Unauthenticated; a new request must then call `failed`."""

    def failed(self, error: Unauthenticated, peer: Peer) -> None:  # noqa: B027  optional
        """Counts a wrong credential against the peer's address."""


class OpenAuthenticator(Authenticator):
    """Without an auth file: every caller is anonymous. Only local ones may change something."""

    def __init__(self, *, allow_remote_admin: bool) -> None:
        self._allow_remote_admin = allow_remote_admin

    def relevant(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        return [header for header in headers if header[0] in FORWARDING]

    def identify(self, relevant: list[tuple[bytes, bytes]], peer: Peer) -> Caller:
        may_change = (peer.is_local and not relevant) or self._allow_remote_admin
        return Caller(LOCAL_CALLER if may_change else REMOTE_CALLER, peer)


class FileAuthenticator(Authenticator):
    """Knows the principals of an auth file."""

    def __init__(self, identities: Identities, limit: FailureLimit) -> None:
        self._limit = limit
        self._verified: dict[bytes, tuple[Principal, float]] = {}  # by Authorization value
        self.replace(identities)

    def replace(self, identities: Identities) -> None:
        """Uses another content of the auth file from now on."""
        self._identities = identities
        proxy = identities.proxy
        self._headers = {AUTHORIZATION, proxy.header} if proxy else {AUTHORIZATION}
        # Owners of valid tokens keep their access, whatever others send from the same address.
        known = {value: self._lookup(value) for value in self._verified}
        self._verified = {value: found for value, found in known.items() if found}

    def relevant(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        names = self._headers
        return [header for header in headers if header[0] in names]

    def identify(self, relevant: list[tuple[bytes, bytes]], peer: Peer) -> Caller:
        """A trusted proxy's header counts first, then a token, then a client certificate."""
        if len(relevant) == 1 and relevant[0][0] == AUTHORIZATION:  # the usual case
            known = self._verified.get(relevant[0][1])
            if known is not None:
                return self._of_verified(known, peer)
        proxy = self._identities.proxy
        if proxy is not None:
            users = [value for name, value in relevant if name == proxy.header]
            if users and proxy.trusts(peer):
                return self._of_user(users, proxy.users.get(users[0]), peer)
        values = [value for name, value in relevant if name == AUTHORIZATION]
        if values:
            return self._of_token(values, peer)
        if peer.certificate is not None:
            return self._of_certificate(peer.certificate, peer)
        raise Unauthenticated(
            "a credential is missing: send the header 'authorization: Bearer TOKEN' or a client "
            "certificate",
            MISSING,
        )

    def _of_user(self, users: list[bytes], principal: Principal | None, peer: Peer) -> Caller:
        """The proxy is trusted, so its failures are not limited."""
        if principal is None or len(users) > 1:
            reason = UNKNOWN_USER if principal is None else MALFORMED
            raise Unauthenticated("the proxy's header names no principal of this server", reason)
        return Caller(principal, peer)

    def _of_token(self, values: list[bytes], peer: Peer) -> Caller:
        if len(values) > 1:
            raise Unauthenticated("authorization: is given several times; give it once", MALFORMED)
        value = values[0]
        return self._of_verified(self._verified.get(value) or self._verify(value, peer), peer)

    def _of_verified(self, known: tuple[Principal, float], peer: Peer) -> Caller:
        principal, expires_s = known
        if expires_s != math.inf and expires_s <= time.time():
            raise Unauthenticated("authorization: the token has expired", EXPIRED)
        return Caller(principal, peer, expires_s)

    def _verify(self, value: bytes, peer: Peer) -> tuple[Principal, float]:
        self._check_limit(peer)
        found = self._lookup(value)
        if found is None:
            if token_of(value) is None:
                message = "authorization: is not 'Bearer TOKEN' with a whole token"
                raise Unauthenticated(message, MALFORMED)
            raise Unauthenticated("authorization: the token is not valid", UNKNOWN_TOKEN)
        if len(value) <= MAX_VERIFIED_BYTES:
            if len(self._verified) >= MAX_VERIFIED:
                self._verified.clear()
            self._verified[value] = found
        return found

    def _lookup(self, value: bytes) -> tuple[Principal, float] | None:
        """The principal of a token, and when the token expires; None if it is not valid."""
        given = token_of(value)
        if given is None:
            return None
        stored = self._identities.tokens.get(given.id)
        digest = NO_DIGEST if stored is None else stored.digest
        if not hmac.compare_digest(given.digest, digest) or stored is None:
            return None
        return stored.principal, stored.expires_s

    def _of_certificate(self, certificate: PeerCertificate, peer: Peer) -> Caller:
        principals = self._identities.principals_of(certificate)
        if len(principals) != 1:
            raise Unauthenticated(
                "no token is given, and the client certificate belongs to "
                f"{'several principals' if principals else 'no principal'} of this server",
                UNKNOWN_CERTIFICATE,
            )
        return Caller(principals.pop(), peer)

    def failed(self, error: Unauthenticated, peer: Peer) -> None:
        if error.reason in GUESSES:
            self._limit.failed(peer.host)

    def _check_limit(self, peer: Peer) -> None:
        wait_s = self._limit.wait_s(peer.host)
        if wait_s:
            raise Unauthenticated(
                "too many wrong credentials came from this address; try again in "
                f"{math.ceil(wait_s)} s",
                LIMITED,
            )
