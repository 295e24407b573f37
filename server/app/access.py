"""Builds access control: from an auth file, or open to everybody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from server.security.access import AccessControl
from server.security.audit import AuditLog
from server.security.identity.auth_watcher import AuthFile, AuthFileWatcher, fields_of
from server.security.identity.authenticator import FAILURES, FileAuthenticator, OpenAuthenticator
from server.security.identity.failure_limit import FailureLimit
from server.security.identity.failure_report import FailureReport
from server.settings import Settings
from server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


class AuthFileUse(NamedTuple):
    """An auth file, and the authenticator that uses it."""

    file: AuthFile
    authenticator: FileAuthenticator


class Access(NamedTuple):
    control: AccessControl
    audit: AuditLog
    file_use: AuthFileUse | None  # None without --auth


def build_access(settings: Settings, metrics: Metrics) -> Access:
    """Raises CannotServe if there is an auth file that can't be used."""
    audit, failures = AuditLog(), metrics.auth_failures
    for reason in FAILURES:
        failures.labels(reason)  # start at 0, so that rate() sees the first one
    report = FailureReport(lambda reason: failures.labels(reason).inc())
    if not settings.auth:
        everybody = OpenAuthenticator(allow_remote_admin=settings.allow_remote_admin)
        return Access(AccessControl(everybody, audit, report), audit, None)
    file = AuthFile(Path(settings.auth))
    log.info("auth_file_loaded", extra=fields_of(file))
    if file.identities.tokens and not settings.tls_cert and settings.listens_outside():
        # A proxy in front may speak TLS.
        log.warning("tokens_without_tls", extra={"host": settings.host, "action": "--tls-cert"})
    if file.identities.certificates and not settings.tls_client_ca:
        log.warning("certificates_without_client_ca", extra={"action": "--tls-client-ca"})
    limit = FailureLimit(settings.max_auth_failures_per_min, settings.trusted_networks())
    authenticator = FileAuthenticator(file.identities, limit)
    control = AccessControl(authenticator, audit, report)
    return Access(control, audit, AuthFileUse(file, authenticator))


def watcher_of(
    use: AuthFileUse, metrics: Metrics, on_change: Callable[[], None]
) -> AuthFileWatcher:
    """Watches the auth file; `on_change` is called when callers may have lost a permission."""

    def set_valid(is_valid: bool) -> None:
        metrics.auth_file_refused.set(0 if is_valid else 1)

    return AuthFileWatcher(use.file, use.authenticator, on_change, set_valid)
