"""serving.json: which versions of a model are loaded, and which of them gets a request.

    <root>/<model>/serving.json    {"versions": "latest:2", "labels": {"stable": 3, "canary": 4},
                                    "canary_percent": 5}

`python -m server.repository label` writes the file and the server reads it. Without the file, the
server's own settings apply to the model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from server.repository.links import ANYWHERE, Links
from server.repository.manifest import MODEL_NAME, InvalidVersion
from server.repository.reader import read_limited
from server.repository.text import decode_text
from server.repository.writer import exclusive_lock, fsync

SERVING_CONFIG_FILE = "serving.json"
MAX_BYTES = 64 << 10  # of the file; it usually has about 100 bytes
VERSION_LABELS = ("stable", "canary")
Label = Literal["stable", "canary"]
POLICIES = "latest:N, all, or named:N,N,..."


class VersionPolicy(NamedTuple):
    """Which valid versions of a model are loaded: the latest N, all, or named ones."""

    latest: int | None = None  # None: all
    named: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """Parses "latest:2", "all" or "named:1,3". Raises ValueError."""
        kind, _, rest = text.partition(":")
        numbers = [int(part) for part in rest.split(",") if _is_number(part)]
        if text == "all":
            return cls()
        if kind == "latest" and len(numbers) == 1 and "," not in rest:
            return cls(latest=numbers[0])
        if kind == "named" and len(numbers) == rest.count(",") + 1:
            return cls(named=frozenset(numbers))
        raise ValueError(f"is {text[:80]!r}; it must be {POLICIES}, each N a whole number from 1")

    def choose(self, versions: Sequence[int]) -> Sequence[int]:
        """Selects the versions to load; both sequences run from new to old."""
        if self.named:
            return [version for version in versions if version in self.named]
        return versions[: self.latest]


SERVE_LATEST = VersionPolicy(latest=1)


class ServingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of serving.json."""

    versions: Annotated[str, Meta(max_length=4096)] = ""  # a VersionPolicy; empty: the server's
    labels: dict[Label, Annotated[int, Meta(ge=1, lt=10**18)]] = {}
    canary_percent: Annotated[float, Meta(ge=0, le=100)] = 0.0  # of requests without a version

    def version(self, label: str) -> int:
        """The version with this label, or 0."""
        return {str(name): version for name, version in self.labels.items()}.get(label, 0)

    def policy(self, default: VersionPolicy) -> VersionPolicy:
        """The model's own policy, or `default`. Raises ValueError if the policy is malformed."""
        return VersionPolicy.parse(self.versions) if self.versions else default


def read_serving_config(home: Path, links: Links = ANYWHERE) -> ServingConfig:
    """Reads serving.json from a model's folder; a missing file means the defaults.

    Raises InvalidVersion.
    """
    try:
        text = read_limited(home / SERVING_CONFIG_FILE, MAX_BYTES, links)
    except FileNotFoundError:
        return ServingConfig()
    try:
        config = msgspec.json.decode(decode_text(text), type=ServingConfig)
    except (ValueError, RecursionError) as error:
        raise InvalidVersion(f"{SERVING_CONFIG_FILE} is malformed: {error}") from None
    try:
        config.policy(SERVE_LATEST)
    except ValueError as error:
        raise InvalidVersion(f"{SERVING_CONFIG_FILE}: versions {error}") from None
    return config


def write_serving_config(root: Path, model: str, config: ServingConfig) -> None:
    """Replaces serving.json in one step, so readers see the old file or the new one.

    Raises OSError, and ValueError if `model` is not a valid name.
    """
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name {model!r} must match {MODEL_NAME.pattern}")
    home = root / model
    with exclusive_lock(home):
        descriptor, name = tempfile.mkstemp(prefix=".serving-", dir=home)
        try:
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
            os.chmod(name, 0o644)
            fsync(Path(name))
            os.replace(name, home / SERVING_CONFIG_FILE)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        fsync(home)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text[:19]) > 0 and len(text) <= 18
