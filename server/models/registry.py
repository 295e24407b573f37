"""Registry of models: every known version, its state, and the requests it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import groupby

from server.engines.base import Engine
from server.errors import InvalidInput, ModelNotReady
from server.execution.device import DeviceExecutor
from server.models.changes import ChangeNotifier
from server.models.loader import Loader
from server.models.model import Model, missing_model
from server.models.reconciler import Reconciler
from server.models.state import State
from server.models.version import LoadedModel, ModelVersion
from server.repository.contents import VersionEntry
from server.repository.serving_config import SERVE_LATEST, ServingConfig, VersionPolicy
from server.telemetry.metrics import Metrics


class ModelRegistry:
    """All models of the server. Used on the event loop's thread only.

    Models that `is_enabled` rejects are loaded only on request. The owner runs `reconcile_forever`
    in a task and cancels it. For the other arguments see `Reconciler` and `Model`.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        load_thread: Executor,
        executor_for: Callable[[Engine], DeviceExecutor],
        metrics: Metrics,
        changes: ChangeNotifier,
        policy: VersionPolicy = SERVE_LATEST,
        bake_time_s: float = 0.0,
        is_enabled: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._metrics = metrics
        self._changes = changes
        self._policy = policy
        self._is_enabled = is_enabled
        self._models: dict[str, Model] = {}
        self._lock = asyncio.Lock()  # versions are loaded and unloaded one at a time
        self._reconciler = Reconciler(
            loader=loader,
            load_thread=load_thread,
            executor_for=executor_for,
            metrics=metrics,
            bake_time_s=bake_time_s,
        )
        self.is_loading = True  # until the first `sync` has ended

    # --- lookups -------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether the first `sync` has ended and some model answers requests."""
        return not self.is_loading and any(model.stable for model in self._models.values())

    def names(self) -> list[str]:
        """The names of all known models."""
        return sorted(self._models)

    def is_serving(self, name: str) -> bool | None:
        """Whether the model answers requests; None if it is not known."""
        return self._models[name].stable is not None if name in self._models else None

    def route(
        self, name: str, version: int = 0, label: str = "", request_id: str = ""
    ) -> LoadedModel:
        """The loaded version for an inference request.

        A request that names neither version nor label may go to the canary; the same `request_id`
        always goes to the same version. Raises as `version` does, and ModelNotReady.
        """
        model = self._models.get(name)
        if model is None or version or label:
            return _ready(self.version(name, version, label))
        return _ready(model.route(request_id))

    def resolve(self, name: str, version: int = 0, label: str = "") -> LoadedModel:
        """The loaded version for a call that runs no inference; it never counts for a canary.

        Raises as `route` does.
        """
        return _ready(self.version(name, version, label))

    def version(self, name: str, version: int = 0, label: str = "") -> ModelVersion:
        """The version with a number or a label; else the one that answers, or the newest.

        Raises InvalidInput if the name is empty, ModelNotFound with the known names.
        """
        if name not in self._models:
            raise missing_model(name, self.names())
        if version < 0:
            raise InvalidInput("version", f"is {version}; versions count from 1, 0 is the newest")
        return self._models[name].version(version, label)

    def labels(self, version: ModelVersion) -> list[str]:
        """The labels that select this version now."""
        return self._models[version.model_name].labels(version)

    def versions(self) -> list[ModelVersion]:
        """All versions, by model name, the newest first."""
        return [version for name in sorted(self._models) for version in self._models[name].versions]

    def serving_models(self) -> list[LoadedModel]:
        """The versions that answer requests."""
        return [version.ready_model for version in self.versions() if version.ready_model]

    def queued_rows(self) -> dict[str, int]:
        """Rows that wait for an engine, by name of each loaded model."""
        rows: dict[str, int] = {}
        for version in self.versions():
            if version.loaded is not None:
                queued = version.loaded.executor.queued_rows(version.loaded.key)
                rows[version.model_name] = rows.get(version.model_name, 0) + queued
        return rows

    # --- changes -------------------------------------------------------------------------------

    async def sync(
        self, published: Iterable[VersionEntry], configs: Mapping[str, ServingConfig]
    ) -> None:
        """Makes every model serve what the repository holds now.

        Loads new versions that are selected, one after the other, moves requests to them, and
        unloads versions that are not selected any more.
        """
        async with self._lock:
            groups = {
                name: list(group) for name, group in groupby(published, key=lambda one: one.model)
            }
            for name in [*groups, *(self._models.keys() - groups)]:
                self._update(name, groups.get(name, []), configs.get(name))
            await self._reconcile_all()
            if self.is_loading:
                self.is_loading = False
                self._changes.notify()

    async def load(
        self, name: str, published: Sequence[VersionEntry], config: ServingConfig | None
    ) -> None:
        """Makes one model serve what the repository holds now; tries failed versions again.

        Raises ModelNotFound, or ModelNotReady if the newest selected version can't be loaded; an
        older version may serve then.
        """
        async with self._lock:
            self._update(name, published, config)
            if name not in self._models:
                raise missing_model(name, self.names())
            model = self._models[name]
            model.allow_retry()
            model.enable()
            await self._reconcile(model)
            _check_newest(model)

    async def unload(self, name: str) -> None:
        """Stops requests to a model at once; unloads it when its requests are finished.

        Raises ModelNotFound.
        """
        model = self._models[self.version(name).model_name]
        model.disable()
        async with self._lock:
            if self._models.get(name) is model:
                model.disable()  # a load that held the lock may have enabled it again
                await self._reconcile(model)

    def roll_back(
        self, version: ModelVersion, reason: str, cause: str, *, stop_now: bool = False
    ) -> None:
        """Moves requests from a version that serves to another version.

        While no other version is loaded, this one keeps serving unless `stop_now`. It also keeps
        serving if the model has no other usable version.
        """
        model = self._models[version.model_name]
        self._reconciler.roll_back(model, version, reason, cause, stop_now=stop_now)

    def check_bake_times(self, now_s: float) -> None:
        """Rolls back versions that miss their objective; ends bake times that are over."""
        for version in self.versions():
            model = self._models[version.model_name]
            self._reconciler.check_bake_time(model, version, now_s)

    async def reconcile_forever(self) -> None:
        """Loads and unloads versions after failures and at the end of bake times."""
        while True:
            await self._reconciler.wait_until_needed()
            async with self._lock:
                await self._reconcile_all()

    async def unload_all(self) -> None:
        """Waits for running batches and closes every engine."""
        for version in self.versions():
            await self._reconciler.close(version)

    def _update(
        self, name: str, published: Sequence[VersionEntry], config: ServingConfig | None
    ) -> None:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = Model(
                name,
                is_enabled=self._is_enabled(name),
                default_policy=self._policy,
                metrics=self._metrics,
                changes=self._changes,
            )
        model.update(published, config)
        if not model.versions:
            del self._models[name]
            self._metrics.forget_model(name)

    async def _reconcile_all(self) -> None:
        for model in list(self._models.values()):
            await self._reconcile(model)

    async def _reconcile(self, model: Model) -> None:
        # While the server starts there are no requests that loading could slow down.
        await self._reconciler.reconcile(model, at_idle_priority=not self.is_loading)


def _ready(version: ModelVersion) -> LoadedModel:
    ready = version.ready_model
    if ready is not None:
        return ready
    detail = f": {version.reason}" if version.reason else ""
    state = version.state.name.lower()
    raise ModelNotReady(f"model {version.model_name!r} version {version.number} is {state}{detail}")


def _check_newest(model: Model) -> None:
    """Raises ModelNotReady if a version that is newer than any ready one has failed."""
    for version in model.versions:
        if version.state is State.READY:
            return
        if version.state is State.FAILED:
            serving = f"; version {model.stable.number} answers" if model.stable else ""
            raise ModelNotReady(
                f"model {model.name!r} version {version.number} can't be loaded: "
                f"{version.reason}{serving}"
            )
