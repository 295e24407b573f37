"""Access control as the transport needs it: a decision from the head of a call."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from grpc import StatusCode

from server.security.caller import Caller
from server.security.peer import Peer
from server.security.principal import LOCAL_CALLER
from server.transport.metadata import RequestHead


class Denial(NamedTuple):
    """The status of a call that may not run."""

    code: StatusCode
    message: str


class CallAccess(Protocol):
    """Decides from the head of a call. Used on the event loop's thread only."""

    def admit(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        """The caller of a new call. Counts denials."""

    def recheck(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        """The caller of a call in progress, after permissions have changed. Counts nothing."""


class EverybodyMayCall:
    """Access without permissions, for servers that have none."""

    def admit(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        return Caller(LOCAL_CALLER, peer)

    def recheck(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        return Caller(LOCAL_CALLER, peer)
