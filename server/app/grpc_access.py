"""Access control for calls by gRPC."""

from __future__ import annotations

from server.api.status import STATUS, message_of
from server.errors import Forbidden, Unauthenticated
from server.security.access import AccessControl
from server.security.caller import Caller
from server.security.peer import Peer
from server.transport.access import Denial
from server.transport.metadata import RequestHead


class GrpcAccess:
    """Implements server.transport.access.CallAccess. Used on the event loop's thread only."""

    def __init__(self, control: AccessControl) -> None:
        self._control = control

    def admit(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        method = _method_of(head)
        try:
            return self._control.admit(method, head.fields, peer)
        except (Unauthenticated, Forbidden) as error:
            return Denial(STATUS[type(error)], message_of(error, method))

    def recheck(self, head: RequestHead, peer: Peer) -> Caller | Denial:
        method = _method_of(head)
        try:
            return self._control.recheck(method, head.fields, peer)
        except (Unauthenticated, Forbidden) as error:
            return Denial(STATUS[type(error)], message_of(error, method))


def _method_of(head: RequestHead) -> str:
    """The name of the RPC: what follows the last slash of the path."""
    return head.path.rpartition("/")[2]
