"""The models as a caller sees them: those that its principal may not use do not exist."""

from __future__ import annotations

from server.models.model import missing_model
from server.models.registry import ModelRegistry
from server.models.version import LoadedModel, ModelVersion
from server.security.principal import Principal


class VisibleModels:
    """Lookups in the registry for one principal; errors list only the models that it sees.

    Every protocol looks models up here. Used on the event loop's thread only.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    @property
    def is_ready(self) -> bool:
        """Whether some model answers requests; everybody may know that."""
        return self._registry.is_ready

    def route(
        self, principal: Principal, name: str, version: int, label: str, request_id: str
    ) -> LoadedModel:
        """As ModelRegistry.route."""
        if not principal.sees_all_models:
            self.check(principal, name)
        return self._registry.route(name, version, label, request_id)

    def resolve(
        self, principal: Principal, name: str, version: int = 0, label: str = ""
    ) -> LoadedModel:
        """As ModelRegistry.resolve."""
        if not principal.sees_all_models:
            self.check(principal, name)
        return self._registry.resolve(name, version, label)

    def version(
        self, principal: Principal, name: str, version: int = 0, label: str = ""
    ) -> ModelVersion:
        """As ModelRegistry.version."""
        if not principal.sees_all_models:
            self.check(principal, name)
        return self._registry.version(name, version, label)

    def versions(self, principal: Principal) -> list[ModelVersion]:
        versions = self._registry.versions()
        if principal.sees_all_models:
            return versions
        return [version for version in versions if principal.sees(version.model_name)]

    def serving_models(self, principal: Principal) -> list[LoadedModel]:
        models = self._registry.serving_models()
        if principal.sees_all_models:
            return models
        return [model for model in models if principal.sees(model.name)]

    def labels(self, version: ModelVersion) -> list[str]:
        return self._registry.labels(version)

    def is_serving(self, principal: Principal, name: str) -> bool | None:
        """Whether a model answers requests; None if the principal sees no such model."""
        is_serving = self._registry.is_serving(name)
        return is_serving if is_serving is None or principal.sees(name) else None

    def check(self, principal: Principal, name: str) -> None:
        """Raises the same error for a model that is not there and for one that is not seen."""
        if self.is_serving(principal, name) is None:
            raise self.missing(principal, name)

    def missing(self, principal: Principal, name: str) -> Exception:
        """The error for a model that the principal does not see."""
        return missing_model(name, filter(principal.sees, self._registry.names()))
