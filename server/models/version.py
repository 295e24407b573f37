"""One version of a model: its files, its state and, while it is loaded, its engine."""

from __future__ import annotations

import logging
from typing import NamedTuple

from msgspec.structs import replace

from server.engines.base import Engine
from server.execution.device import DeviceExecutor
from server.images.input_spec import InputSpec
from server.models.rollback import RequestCounts, RollbackPolicy
from server.models.state import State, VersionState
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord, Manifest
from server.telemetry.metrics import INFERENCE_METHODS, Metrics, ModelMetrics

log = logging.getLogger(__name__)

REPLACED = (
    "its folder now holds a different network than the loaded one; publish the network as a new "
    "version, or restart the server"
)


class LoadedModel(NamedTuple):
    """Everything that a request needs from a loaded version."""

    name: str
    version_text: str
    key: str  # name of the version in its executor
    executor: DeviceExecutor
    manifest: Manifest
    spec: InputSpec
    labels: tuple[str, ...]
    engine: Engine
    record: EngineRecord
    metrics: ModelMetrics

    def request_counts(self) -> RequestCounts:
        totals = self.metrics.totals
        return RequestCounts(totals.calls, totals.late_calls)


class ModelVersion:
    """Version of a model that the repository holds or that is still loaded.

    Used on the event loop's thread only. Each state change updates metrics and the log.
    """

    def __init__(self, published: VersionEntry, metrics: Metrics) -> None:
        self.published = published  # as last seen in the repository, or as loaded
        self.evaluation = published.evaluation  # as last seen in the repository
        self.loaded: LoadedModel | None = None
        self.rollback_policy: RollbackPolicy | None = None  # set during bake time
        self.previous: ModelVersion | None = None  # stays loaded during this one's bake time
        self.rejection = ""  # why the version must not serve, even if it still can
        self.rollback_cause = ""  # label of convserve_rollbacks, until the rollback is counted
        self.skipped_engines = ""  # better engines of the version, and why they don't run here
        self.is_removed = False  # from the repository
        self._state = VersionState()
        self._metrics = VersionMetrics(metrics, published.model, str(published.version))
        self._metrics.set_state(self.state)

    @property
    def model_name(self) -> str:
        return self.published.model

    @property
    def number(self) -> int:
        return self.published.version

    @property
    def manifest(self) -> Manifest | None:
        return self.published.manifest

    @property
    def state(self) -> State:
        return self._state.state

    @property
    def reason(self) -> str:
        return self._state.reason

    @property
    def ready_model(self) -> LoadedModel | None:
        """The loaded model if it accepts requests, else None."""
        return self.loaded if self._state.state is State.READY else None

    @property
    def can_serve(self) -> bool:
        """Whether the version could get requests, once it is loaded."""
        return self.state is not State.FAILED and not self.rejection and not self.is_removed

    def log_fields(self, **more: object) -> dict[str, object]:
        return {"model": self.model_name, "version": self.number, **more}

    # --- repository ----------------------------------------------------------------------------

    def update(self, published: VersionEntry) -> None:
        """Takes over what the repository holds now."""
        self.is_removed = False
        self.evaluation = published.evaluation
        if self.loaded is None and (published != self.published or published.manifest is None):
            self._update_unloaded(published)
        elif (self.reason == REPLACED) != _is_other_network(self.published, published):
            if self.reason == REPLACED:  # the loaded network is back
                self._move_to(self.state, self.skipped_engines)
            else:
                log.error("version_replaced", extra=self.log_fields(reason=REPLACED))
                self._move_to(self.state, REPLACED)

    def _update_unloaded(self, published: VersionEntry) -> None:
        self.published = published
        if published.manifest is None and published.reason != self.reason:
            if self.state is State.FAILED:
                self._move_to(State.UNAVAILABLE)
            self.fail(published.reason)
        elif published.manifest is not None and self.state is State.FAILED:
            self.allow_retry()
            self.rollback_cause = ""

    def mark_removed(self) -> None:
        """Notes that the repository no longer holds the version."""
        self.is_removed = True

    def forget_metrics(self) -> None:
        """Deletes the version's time series, after the registry has dropped the version."""
        self._metrics.forget()

    # --- loading and unloading -----------------------------------------------------------------

    def start_loading(self) -> None:
        self._move_to(State.LOADING)

    def start_checking(self) -> None:
        """Notes that the engine exists and its golden check begins."""
        if self.state is State.LOADING:
            self._move_to(State.CHECKING)

    def start_serving(
        self,
        loaded: LoadedModel,
        *,
        seconds: float,
        skipped_engines: str,
        rollback_policy: RollbackPolicy | None,
        previous: ModelVersion | None,
    ) -> None:
        """Accepts requests from now on. `seconds` is how long loading took."""
        self.loaded = loaded
        self.rejection = self.rollback_cause = ""
        self.skipped_engines = skipped_engines
        self.rollback_policy, self.previous = rollback_policy, previous
        self._metrics.set_loaded(loaded, seconds, is_fallback=bool(skipped_engines))
        self._move_to(State.READY, skipped_engines)

    def explain(self, reason: str) -> None:
        """Gives a version that is not loaded the reason why, without a change of its state."""
        self._move_to(self.state, reason)

    def drain(self, reason: str) -> None:
        """Accepts no new requests. Does nothing unless the version is loaded."""
        if self.state in (State.READY, State.DRAINING):
            self._move_to(State.DRAINING, reason)

    def resume(self) -> None:
        """Accepts requests again if the version is draining."""
        if self.state is State.DRAINING:
            self._move_to(State.READY, self.skipped_engines)

    def release(self) -> None:
        """Drops the engine at shutdown. State and metrics stay as they are."""
        self.loaded = None

    def _close(self) -> None:
        """Drops the engine. The caller moves the version to its next state."""
        loaded, self.loaded = self.loaded, None
        self.end_bake_time()
        if loaded is not None:
            self._metrics.remove_engine(loaded)

    def finish_unloading(self, reason: str) -> None:
        """Notes that the engine was closed; a rejected version is FAILED from now on."""
        self._close()
        if self.rejection:
            self.fail(self.rejection)
        else:
            self._move_to(State.UNLOADED, reason)
            log.info("version_unloaded", extra=self.log_fields(reason=reason))

    def fail(self, reason: str) -> None:
        self._move_to(State.FAILED, reason)
        log.error("version_failed", extra=self.log_fields(reason=reason))

    def fail_stalled(self, reason: str) -> None:
        """Notes that the executor abandoned the engine, which may still run a batch."""
        self._close()
        self.rollback_cause = "stalled"
        self.fail(reason)

    def allow_retry(self) -> None:
        """Lets a failed version be loaded again."""
        self._move_to(State.UNAVAILABLE)
        self.rejection = ""

    # --- bake time and rollback ----------------------------------------------------------------

    def is_baking(self, now_s: float) -> bool:
        return self.rollback_policy is not None and not self.rollback_policy.has_ended(now_s)

    def end_bake_time(self) -> None:
        self.rollback_policy = self.previous = None

    def reject(self, reason: str, cause: str, *, stop_now: bool) -> None:
        """Marks the version as one that must not serve. `stop_now` drains it at once."""
        self.rejection, self.rollback_cause = reason, cause
        if stop_now:
            self.drain(reason)
        log.error("version_rejected", extra=self.log_fields(reason=reason, cause=cause))

    def take_rollback_cause(self) -> str:
        """The cause, which is counted only once; empty if there is none left."""
        cause, self.rollback_cause = self.rollback_cause, ""
        return cause

    def _move_to(self, state: State, reason: str = "") -> None:
        old = self.state
        if self._state.move_to(state, reason):
            self._metrics.set_state(state)
            extra = self.log_fields(old=old.name, state=state.name)
            log.debug("version_state_changed", extra=extra)


class VersionMetrics:
    """The time series of one version that do not count requests."""

    def __init__(self, metrics: Metrics, model: str, number: str) -> None:
        self._metrics = metrics
        self._labels = (model, number)

    def set_state(self, state: State) -> None:
        self._metrics.ready.labels(*self._labels).set(state is State.READY)
        for other in State:
            self._metrics.state.labels(*self._labels, other.name).set(other is state)

    def set_loaded(self, loaded: LoadedModel, seconds: float, *, is_fallback: bool) -> None:
        for method in INFERENCE_METHODS:  # from 0, so that a rate sees the first failure
            self._metrics.requests.labels(*self._labels, method, "INTERNAL")
        self._metrics.engine_info.labels(*_engine_labels(loaded)).set(1)
        backend = loaded.record.backend
        self._metrics.engine_fallback.labels(*self._labels, backend).set(is_fallback)
        self._metrics.engine_load.labels(loaded.name).set(seconds)

    def remove_engine(self, loaded: LoadedModel) -> None:
        labels = _engine_labels(loaded)
        self._metrics.engine_info.remove(*labels)
        self._metrics.engine_fallback.remove(*labels[:3])
        self._metrics.forget_latency(*self._labels)

    def forget(self) -> None:
        self._metrics.forget_requests(*self._labels)
        self._metrics.ready.remove(*self._labels)
        for state in State:
            self._metrics.state.remove(*self._labels, state.name)


def weights_kind(manifest: Manifest) -> str:
    return "trained" if manifest.weights.trained else "untrained"


def _engine_labels(loaded: LoadedModel) -> tuple[str, ...]:
    """The labels of convserve_engine_info."""
    record, weights = loaded.record, weights_kind(loaded.manifest)
    return loaded.name, loaded.version_text, record.backend, record.precision, weights


def _is_other_network(loaded: VersionEntry, published: VersionEntry) -> bool:
    """Whether a version's folder holds another network than before. More engines are allowed."""
    if loaded.manifest is None or published.manifest is None:
        return False
    return replace(loaded.manifest, engines=()) != replace(published.manifest, engines=())
