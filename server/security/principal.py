"""A principal: the identity of a caller, with its permissions and its quota."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import translate

ALL_MODELS = ("*",)
MAX_MODEL_NAME = 64  # characters; the repository allows no longer name


class Role(StrEnum):
    """A set of methods that a principal may call."""

    CLASSIFY = "classify"  # inference, and what a client must know about a model for it
    OBSERVE = "observe"  # metrics, lists, statistics
    ADMIN = "admin"  # changes: loading and unloading models, shared memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller's identity. A reload of the auth file makes new principals with the old names."""

    name: str
    roles: frozenset[Role]
    models: tuple[str, ...] = ALL_MODELS  # globs; all other models do not exist for the principal
    images_per_s: float = math.inf
    burst: float = math.inf  # images at once
    max_calls: int | None = None  # in progress; None is no limit
    weight: float = 1.0  # share of the devices' time, relative to other principals
    sees_all_models: bool = field(init=False, repr=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pattern = "|".join(translate(glob) for glob in self.models) or r"(?!)"
        object.__setattr__(self, "_pattern", re.compile(pattern))
        object.__setattr__(self, "sees_all_models", "*" in self.models)

    def sees(self, model: str) -> bool:
        """Whether the principal may use a model, and may know that it exists."""
        if self.sees_all_models:
            return True
        return len(model) <= MAX_MODEL_NAME and self._pattern.match(model) is not None


ANONYMOUS = "anonymous"  # the name of every caller of a server without --auth

# Callers of a server without --auth: on this machine, and on another machine.
LOCAL_CALLER = Principal(name=ANONYMOUS, roles=frozenset(Role))
REMOTE_CALLER = Principal(name=ANONYMOUS, roles=frozenset(Role) - {Role.ADMIN})

# A caller without valid credentials may call the open methods, and sees no model. Its calls in
# progress are health watches. They may not take the place of other callers.
STRANGER = Principal(name="stranger", roles=frozenset(), models=(), max_calls=1000, weight=0.01)

RESERVED_NAMES = frozenset({ANONYMOUS, STRANGER.name})  # not for principals of the auth file
