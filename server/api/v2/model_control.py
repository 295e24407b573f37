"""Loading and unloading of models by request (Triton's model repository extension)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

from server.api.context import CallContext
from server.api.v2.metadata import check_repository
from server.api.v2.versions import MAX_QUOTED
from server.api.visible_models import VisibleModels
from server.errors import InvalidInput, ModelNotFound
from server.models.watcher import RepositoryWatcher
from server.security.audit import AuditLog

UNLOAD_DEPENDENTS = "unload_dependents"  # has no effect: no model depends on another


class ModelControl:
    """Loads and unloads models, and writes that to the audit log.

    `watcher` is None if models can't be loaded by request.
    """

    def __init__(
        self, watcher: RepositoryWatcher | None, models: VisibleModels, audit: AuditLog
    ) -> None:
        self._watcher = watcher
        self._models = models
        self._audit = audit

    async def load(
        self, context: CallContext, repository_name: str, model: str, parameters: Iterable[str]
    ) -> None:
        """Loads a model, or its new versions; returns once it answers requests.

        Raises InvalidInput, ModelNotFound, ModelNotReady.
        """
        with self._action(context, "RepositoryModelLoad", model):
            await self._allowed(repository_name, parameters, frozenset()).load(model)

    async def unload(
        self, context: CallContext, repository_name: str, model: str, parameters: Iterable[str]
    ) -> None:
        """Unloads a model; returns once its last requests are answered. Raises as `load` does."""
        with self._action(context, "RepositoryModelUnload", model):
            watcher = self._allowed(repository_name, parameters, frozenset({UNLOAD_DEPENDENTS}))
            await watcher.unload(model)

    @contextmanager
    def _action(self, context: CallContext, name: str, model: str) -> Iterator[None]:
        """Keeps models that the caller does not see from it, and from its actions."""
        principal = context.caller.principal
        with self._audit.action(context.caller, name, model):
            try:
                if not principal.sees(model):
                    raise self._models.missing(principal, model)
                yield
            except ModelNotFound:
                raise self._models.missing(principal, model) from None

    def _allowed(
        self, repository_name: str, parameters: Iterable[str], known: Set[str]
    ) -> RepositoryWatcher:
        """The watcher, if the request is allowed. Raises InvalidInput."""
        check_repository(repository_name)
        for name in sorted(parameters):
            if name not in known:
                raise InvalidInput(
                    f"parameters[{name[:MAX_QUOTED]}]",
                    "is not allowed: the model's folder in the repository says what the model is",
                )
        if self._watcher is None:
            raise InvalidInput(
                "model_name",
                "can't be loaded or unloaded by request: start the server with "
                "--model-control explicit",
            )
        return self._watcher
