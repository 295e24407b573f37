"""Bearer tokens: `cs_ID_SECRET`, with a public id and 256 random bits.

The server stores only a SHA-256 hash. A slow hash would add nothing: nobody can guess 256 bits.
"""

from __future__ import annotations

import re
import secrets
from hashlib import sha256
from typing import NamedTuple

ID_BYTES = 8
SECRET_BYTES = 32

_TOKEN = re.compile(rb"cs_([0-9a-f]{16})_[0-9a-f]{64}")
# RFC 9110: the scheme's name is case-insensitive.
_AUTHORIZATION = re.compile(rb"(?i:bearer) +(" + _TOKEN.pattern + rb")")


class GivenToken(NamedTuple):
    """A token that a caller sent."""

    id: str
    digest: bytes


class NewToken(NamedTuple):
    """A token that nobody has yet. `text` must be shown once and stored nowhere."""

    id: str
    text: str
    sha256: str  # of the text, in hexadecimal


def new_token() -> NewToken:
    token_id = secrets.token_hex(ID_BYTES)
    text = f"cs_{token_id}_{secrets.token_hex(SECRET_BYTES)}"
    return NewToken(token_id, text, sha256(text.encode("ascii")).hexdigest())


def token_of(authorization: bytes) -> GivenToken | None:
    """The token in the value of an Authorization header; None if it has another form."""
    found = _AUTHORIZATION.fullmatch(authorization)
    if found is None:
        return None
    return GivenToken(found[2].decode("ascii"), sha256(found[1]).digest())
