"""Which role each method needs. The names are those of the RPCs; REST routes have the same."""

from __future__ import annotations

from server.errors import Forbidden
from server.security.caller import Caller
from server.security.principal import REMOTE_CALLER, Role

READ_METRICS = "metrics"  # GET /metrics

# Everybody may call these: balancers and kubelets, which have no credentials.
OPEN_METHODS = frozenset({"Check", "Watch", "ServerLive", "ServerReady"})

CHANGES = frozenset({Role.ADMIN})
READS = frozenset({Role.OBSERVE})
LISTS = frozenset({Role.OBSERVE, Role.ADMIN})
ANY = frozenset(Role)

# A caller needs one of the roles.
METHOD_ROLES: dict[str, frozenset[Role]] = {
    "Classify": frozenset({Role.CLASSIFY}),
    "ModelInfer": frozenset({Role.CLASSIFY}),
    "ModelStreamInfer": frozenset({Role.CLASSIFY}),
    "GetModel": ANY,
    "ModelMetadata": ANY,
    "ModelConfig": ANY,
    "ModelReady": ANY,
    "ServerMetadata": ANY,
    "ServerReflectionInfo": ANY,
    "ListModels": LISTS,
    "RepositoryIndex": LISTS,
    "SystemSharedMemoryStatus": LISTS,
    "ModelStatistics": READS,
    READ_METRICS: READS,
    "RepositoryModelLoad": CHANGES,
    "RepositoryModelUnload": CHANGES,
    "SystemSharedMemoryRegister": CHANGES,
    "SystemSharedMemoryUnregister": CHANGES,
}


def is_change(method: str) -> bool:
    """Whether the method changes something, so that its calls stand in the audit log."""
    return METHOD_ROLES.get(method) is CHANGES


def check_role(method: str, caller: Caller) -> None:
    """Raises Forbidden. A method that does not exist needs any role."""
    needed = METHOD_ROLES.get(method, ANY)
    if caller.principal.roles.isdisjoint(needed):
        if caller.principal is REMOTE_CALLER:
            raise Forbidden(
                f"{method} changes the server, so it answers only direct callers on this machine; "
                "start the server with --auth, or with --allow-remote-admin"
            )
        names = " or ".join(sorted(needed))
        raise Forbidden(f"{method} needs the role {names}, which this caller does not have")
    if method == READ_METRICS and not caller.principal.sees_all_models:
        raise Forbidden(
            'the metrics show every model; they need the role observe with models = ["*"]'
        )
