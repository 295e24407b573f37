"""Registers shared memory for clients, and writes that to the audit log."""

from __future__ import annotations

from server.api.context import CallContext
from server.api.v2.shared_memory import Region, SharedMemoryRegions
from server.security.audit import AuditLog


class RegionControl:
    """The regions as clients control them. Used on the event loop's thread only."""

    def __init__(self, regions: SharedMemoryRegions, audit: AuditLog) -> None:
        self._regions = regions
        self._audit = audit

    def register(
        self, context: CallContext, name: str, key: str, offset: int, byte_size: int
    ) -> None:
        with self._audit.action(context.caller, "SystemSharedMemoryRegister", name):
            self._regions.register(name, key, offset, byte_size)

    def unregister(self, context: CallContext, name: str) -> None:
        """All regions if the name is empty."""
        with self._audit.action(context.caller, "SystemSharedMemoryUnregister", name):
            self._regions.unregister(name)

    def status(self, name: str) -> list[Region]:
        return self._regions.status(name)
