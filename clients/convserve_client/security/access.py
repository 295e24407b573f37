"""How a command reaches a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from convserve_client.security.tls import TlsOptions
from convserve_client.security.token import check_secrecy


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """TLS, or None for plaintext, and a bearer token, or "" for none."""

    tls: TlsOptions | None = None
    token: str = field(default="", repr=False)
    allow_plaintext_token: bool = False

    def check(self, target: str) -> None:
        """Raises ValueError if others could read the token on its way to the target."""
        if self.token:
            check_secrecy(
                target,
                has_tls=self.tls is not None,
                allow_plaintext=self.allow_plaintext_token,
            )


PLAIN = Access()
