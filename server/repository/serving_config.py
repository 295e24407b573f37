"""What people want served of a model: which versions, and who of them gets which calls.

    <root>/<model>/serving.json    {"versions": "latest:2", "labels": {"stable": 3, "canary": 4},
                                    "canary_percent": 5}

Written by `python -m server.repository label`, read by the server; without it a model is served as
the server's settings say.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from server.repository import reader
from server.repository.manifest import MODEL_NAME, InvalidVersion
from server.repository.reader import IgnoredEntry, Version
from server.repository.writer import locked, sync

SERVING = "serving.json"
LIMIT_BYTES = 64 << 10  # of that file; it has a hundred
VERSION_LABELS = ("stable", "canary")
POLICIES = "latest:N, all, or named:N,N,..."


class VersionPolicy(NamedTuple):
    """Which of a model's sound versions are loaded: the latest so many, all, or those named."""

    latest: int | None = None
    named: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """The policy of "latest:2", "all" or "named:1,3". Raises ValueError."""
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
        """Those of the versions, the newest first, that are to be loaded."""
        if self.named:
            return [version for version in versions if version in self.named]
        return versions[: self.latest]


SERVE_LATEST = VersionPolicy(latest=1)


class ServingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    versions: Annotated[str, Meta(max_length=4096)] = ""  # a VersionPolicy; empty: the server's
    labels: dict[Literal["stable", "canary"], Annotated[int, Meta(ge=1, lt=10**18)]] = {}
    canary_percent: Annotated[float, Meta(ge=0, le=100)] = 0.0  # of the calls that name no version

    def version(self, label: str) -> int:
        """The version that has the label, or 0."""
        return {str(name): version for name, version in self.labels.items()}.get(label, 0)

    def policy(self, otherwise: VersionPolicy) -> VersionPolicy:
        """Raises ValueError."""
        return VersionPolicy.parse(self.versions) if self.versions else otherwise


class Found(NamedTuple):
    """What a look at the repository found."""

    versions: list[Version]  # as repository.scan
    plans: dict[str, ServingConfig]  # of every model whose plan can be read
    strays: list[IgnoredEntry]  # as repository.strays, and plans that can't be read


def look(root: Path) -> Found:
    """All that is in the repository. Raises OSError when `root` can't be read."""
    versions, strays = reader.scan(root), reader.strays(root)
    plans: dict[str, ServingConfig] = {}
    for model in dict.fromkeys(version.model for version in versions):
        try:
            plans[model] = read_plan(root / model)
        except InvalidVersion as error:
            strays.append(IgnoredEntry(root / model / SERVING, str(error)))
    return Found(versions, plans, strays)


def read_plan(home: Path) -> ServingConfig:
    """The plan in a model's folder; an empty one where there is none. Raises Unsound."""
    path = home / SERVING
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InvalidVersion(f"{SERVING} is not a regular file")
        with path.open("rb") as file:
            text = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        return ServingConfig()
    except OSError as error:
        raise InvalidVersion(f"{SERVING} can't be read: {error.strerror}") from None
    if len(text) > LIMIT_BYTES:
        raise InvalidVersion(f"{SERVING} is larger than {LIMIT_BYTES} bytes")
    try:
        plan = msgspec.json.decode(text, type=ServingConfig)
    except (ValueError, RecursionError) as error:
        raise InvalidVersion(f"{SERVING} is no plan: {error}") from None
    try:
        plan.policy(SERVE_LATEST)
    except ValueError as error:
        raise InvalidVersion(f"{SERVING}: versions {error}") from None
    return plan


def write_plan(root: Path, model: str, plan: ServingConfig) -> None:
    """Replaces a model's plan: a reader sees the old one or the new. Raises OSError, ValueError."""
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name {model!r} must match {MODEL_NAME.pattern}")
    home = root / model
    with locked(home):
        descriptor, name = tempfile.mkstemp(prefix=".serving-", dir=home)
        try:
            with open(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
            os.chmod(name, 0o644)
            sync(Path(name))
            os.replace(name, home / SERVING)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        sync(home)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text[:19]) > 0 and len(text) <= 18
