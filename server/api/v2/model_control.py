"""Loading and unloading of models by request (Triton's model repository extension)."""

from __future__ import annotations

from collections.abc import Iterable, Set

from server.api.v2.metadata import check_repository
from server.api.v2.versions import MAX_QUOTED
from server.errors import InvalidInput
from server.models.watcher import RepositoryWatcher

UNLOAD_DEPENDENTS = "unload_dependents"  # has no effect: no model depends on another


class ModelControl:
    """Loads and unloads models. `watcher` is None if callers may not."""

    def __init__(self, watcher: RepositoryWatcher | None) -> None:
        self._watcher = watcher

    async def load(self, repository_name: str, model: str, parameters: Iterable[str]) -> None:
        """Loads a model, or its new versions; returns once it answers requests.

        Raises InvalidInput, ModelNotFound, ModelNotReady.
        """
        await self._allowed(repository_name, parameters, frozenset()).load(model)

    async def unload(self, repository_name: str, model: str, parameters: Iterable[str]) -> None:
        """Unloads a model; returns once its last requests are answered. Raises as `load` does."""
        watcher = self._allowed(repository_name, parameters, frozenset({UNLOAD_DEPENDENTS}))
        await watcher.unload(model)

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
