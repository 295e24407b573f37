"""The models to serve, from the settings and the repository at the start."""

from __future__ import annotations

import logging

from server.engines.base import BACKENDS
from server.errors import CannotServe
from server.repository.contents import RepositoryContents, list_contents
from server.repository.serving_config import VersionPolicy
from server.settings import Settings

log = logging.getLogger(__name__)


def version_policy(settings: Settings) -> VersionPolicy:
    """The default version policy. Raises CannotServe for invalid text."""
    try:
        return VersionPolicy.parse(settings.version_policy)
    except ValueError as error:
        raise CannotServe(f"version_policy {error}") from None


def models_to_serve(settings: Settings) -> RepositoryContents:
    """The versions in the repository that these settings serve.

    Raises CannotServe if there are none, or if the settings name a model or a backend that does not
    exist.
    """
    repo = settings.repo
    build = f"build a model: convserve build lenet5 --repo {repo}"
    if settings.backend and settings.backend not in BACKENDS:
        raise CannotServe(
            f"backend is {settings.backend!r}; it must be one of {', '.join(BACKENDS)}"
        )
    if not repo.is_dir():
        raise CannotServe(f"the model repository {repo} is not a folder; {build}")
    allowed_roots = settings.allowed_root_folders()
    for folder in allowed_roots:
        if not folder.is_dir():
            raise CannotServe(f"allowed_roots has {folder}, which is not a folder")
    try:
        contents = list_contents(repo, allowed_roots)
    except OSError as error:
        raise CannotServe(f"can't read the model repository {repo}: {error.strerror}") from None
    for entry in contents.ignored:
        log.warning("entry_ignored", extra={"path": str(entry.path), "reason": entry.reason})
    names = {version.model for version in contents.versions}
    if missing := sorted(set(settings.model_names()) - names):
        known = ", ".join(sorted(names)) or "none"
        raise CannotServe(f"{repo} has no model {', '.join(missing)}; it has {known}")
    if not contents.versions:
        raise CannotServe(f"the model repository {repo} has no models; {build}")
    if settings.model_control == "explicit":  # clients may load the other models
        return contents
    served = [version for version in contents.versions if settings.serves(version.model)]
    return contents._replace(versions=served)
