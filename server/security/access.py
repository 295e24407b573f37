"""Access control: finds the caller of a request from its head, and checks the permission."""

from __future__ import annotations

from collections.abc import Callable

from server.errors import Forbidden, Unauthenticated
from server.security.audit import AuditLog
from server.security.caller import Caller
from server.security.identity.authenticator import FORBIDDEN, Authenticator, Headers
from server.security.peer import Peer
from server.security.permissions import OPEN_METHODS, check_role, is_change
from server.security.principal import STRANGER


class AccessControl:
    """The same decision for every protocol. Used on the event loop's thread only."""

    def __init__(
        self,
        authenticator: Authenticator,
        audit: AuditLog,
        report: Callable[[str, str], None],
    ) -> None:
        self._authenticator = authenticator
        self._audit = audit
        self._report = report

    def admit(self, method: str, headers: Headers, peer: Peer) -> Caller:
        """The caller of a method. Raises Unauthenticated, Forbidden, and reports them."""
        if method in OPEN_METHODS:
            return self.caller_or_stranger(headers, peer)
        authenticator = self._authenticator
        try:
            caller = authenticator.identify(authenticator.relevant(headers), peer)
        except Unauthenticated as error:
            self._failed(error, peer)
            self._deny(method, Caller(STRANGER, peer), error)
            raise
        try:
            check_role(method, caller)
        except Forbidden as error:
            self._report(FORBIDDEN, peer.host)
            self._deny(method, caller, error)
            raise
        return caller

    def caller_or_stranger(self, headers: Headers, peer: Peer) -> Caller:
        """The caller of an open method, which tells strangers less."""
        relevant = self._authenticator.relevant(headers)
        try:
            return self._authenticator.identify(relevant, peer)
        except Unauthenticated as error:
            if relevant:  # otherwise it is a probe without credentials
                self._failed(error, peer)
            return Caller(STRANGER, peer)

    def recheck(self, method: str, headers: Headers, peer: Peer) -> Caller:
        """The caller of a call in progress. Raises as `admit` does, and reports nothing."""
        authenticator = self._authenticator
        try:
            caller = authenticator.identify(authenticator.relevant(headers), peer)
        except Unauthenticated:
            if method in OPEN_METHODS:
                return Caller(STRANGER, peer)
            raise
        if method not in OPEN_METHODS:
            check_role(method, caller)
        return caller

    def _failed(self, error: Unauthenticated, peer: Peer) -> None:
        self._report(error.reason, peer.host)
        self._authenticator.failed(error, peer)

    def _deny(self, method: str, caller: Caller, error: Exception) -> None:
        if is_change(method):
            self._audit.denied(caller, method, type(error).__name__)
