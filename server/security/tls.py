"""The TLS contexts of both ports, replaced when their files change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from server.errors import CannotServe
from server.security.tls_files import (
    TlsFiles,
    TlsFilesChanged,
    TlsFilesError,
    TlsMaterial,
    load,
)

log = logging.getLogger(__name__)

# Files are compared by content: Kubernetes and certbot exchange links, and network file systems
# send no notice. A change counts once two checks in a row have found it, because certificate and
# key are written one after the other.
CHECK_INTERVAL_S = 1.0

SOON = timedelta(days=14)  # the alert uses the same time

GRPC_PROTOCOL, HTTP_PROTOCOL = "h2", "http/1.1"  # names in ALPN


class Contexts(NamedTuple):
    """The contexts for new connections of each port."""

    grpc: ssl.SSLContext
    http: ssl.SSLContext


class TlsCredentials:
    """Certificate, key and client CAs in use. Any thread may read; only `watch` replaces them.

    Connections keep the context that they started with. Sessions belong to a context, so a client
    of a CA that was removed can't resume one.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        requires_client: bool,
        check_interval_s: float = CHECK_INTERVAL_S,
    ) -> None:
        """With `requires_client` the gRPC port refuses connections without a client certificate.

        The HTTP port never does: probes have none. Raises CannotServe if the files can't be used.
        """
        self._files = files
        self.requires_client = requires_client and files.client_ca is not None
        self._check_interval_s = check_interval_s
        self.is_refusing = False  # the files have changed and can't be used
        try:
            self._material = load(files, files.read())
            self.contexts = self._contexts_of(self._material)
            if files.key_is_world_readable():
                log.warning("tls_key_world_readable", extra={"file": str(files.key)})
        except (TlsFilesError, OSError) as error:
            raise CannotServe(str(error)) from None
        self._report("tls_enabled")

    @property
    def expires(self) -> datetime:
        """When the certificate in use does."""
        return self._material.validity.ends

    async def watch(self) -> None:
        """Follows the files until it is cancelled."""
        seen: tuple[bytes, ...] | str = self._material.contents
        judged = seen
        while True:
            await asyncio.sleep(self._check_interval_s)
            try:
                found = await asyncio.to_thread(self._look)
                is_new = found == seen and found != judged
                if is_new and await asyncio.to_thread(self._judge, found):
                    judged = found
                seen = found
            except Exception:  # must not end the server: the files in use are sound
                log.error("tls_check_failed", exc_info=True)

    def _look(self) -> tuple[bytes, ...] | str:
        """The content of the files, or why they can't be read."""
        try:
            return self._files.read()
        except TlsFilesError as error:
            return str(error)

    def _judge(self, found: tuple[bytes, ...] | str) -> bool:
        """Takes new files into use if they are sound. False if they changed meanwhile."""
        try:
            if isinstance(found, str):
                raise TlsFilesError(found)
            material = load(self._files, found)
            contexts = self._contexts_of(material)
        except TlsFilesChanged:
            return False
        except TlsFilesError as error:
            self.is_refusing = True
            extra = {"reason": str(error), "in_use_until": self.expires.isoformat()}
            log.warning("tls_files_refused", extra=extra)
            return True
        self._material, self.contexts, self.is_refusing = material, contexts, False
        self._report("tls_files_reloaded")
        return True

    def _contexts_of(self, material: TlsMaterial) -> Contexts:
        required = ssl.CERT_REQUIRED if self.requires_client else ssl.CERT_OPTIONAL
        return Contexts(
            grpc=material.context(GRPC_PROTOCOL, required),
            http=material.context(HTTP_PROTOCOL, ssl.CERT_OPTIONAL),
        )

    def _report(self, event: str) -> None:
        starts, ends = self._material.validity
        extra = {"expires": ends.isoformat(), "client_cas": len(self._material.authorities)}
        log.info(event, extra=extra)
        now = datetime.now(UTC)
        if starts > now:
            log.warning("tls_certificate_not_valid_yet", extra={"starts": starts.isoformat()})
        if ends - now < SOON:
            log.warning("tls_certificate_expires_soon", extra={"expires": ends.isoformat()})
