"""What the server serves: each version it knows of, where it stands, and the one that answers.

The newest sound version of a model is loaded; where it fails, the next older one is tried, so what
was sound goes on serving. Every version that does not answer says why.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

from server.engines import Engine
from server.errors import InvalidInput, ModelNotFound, ModelNotReady
from server.host import Host
from server.images import InputSpec
from server.loading import Loaded
from server.metrics import Metrics, ModelMetrics
from server.repository import EngineRecord, Manifest, Unsound, Version

log = logging.getLogger(__name__)

LISTED = 16  # names in an error message


class State(enum.Enum):
    """Where a version stands; the names are those of convserve.v1.Model.State."""

    LOADING = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()
    NOT_LOADED = enum.auto()


class Ready(NamedTuple):
    """A version that answers calls: all that an RPC needs of it."""

    name: str
    version_text: str
    key: str  # its name at its host
    host: Host
    manifest: Manifest
    spec: InputSpec
    labels: tuple[str, ...]
    engine: Engine
    record: EngineRecord
    metrics: ModelMetrics


@dataclass(slots=True, eq=False)
class Status:
    """A version and where it stands."""

    model: str
    version: int
    manifest: Manifest | None
    state: State
    reason: str = ""
    ready: Ready | None = None


class Catalog:
    """The versions known and those that answer. Used on the event loop's thread only.

    `load` blocks and runs on the loader's thread; `host_for` gives the host of an engine's device;
    `changed` is called whenever a model, or the catalog as a whole, begins or ceases to answer.
    """

    def __init__(
        self,
        *,
        load: Callable[[Version], Loaded],
        loader: Executor,
        host_for: Callable[[Engine], Host],
        metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:
        self._load = load
        self._loader = loader
        self._host_for = host_for
        self._metrics = metrics
        self._changed = changed
        self._models: dict[str, list[Status]] = {}  # newest first
        self._serving: dict[str, Ready] = {}
        self.loading = True  # until load_all is through

    async def load_all(self, versions: Sequence[Version]) -> None:
        """Loads the newest sound version of each model, one after the other."""
        for model, group in groupby(versions, key=lambda version: version.model):
            self._models[model] = []
            for version in group:
                waits = version.manifest is not None
                state = State.LOADING if waits else State.FAILED
                status = Status(model, version.version, version.manifest, state, version.reason)
                self._models[model].append(status)
                self._metrics.ready.labels(model, str(version.version)).set(0)
                if not waits:
                    _log_failure(status)
        by_model = {(version.model, version.version): version for version in versions}
        for model, statuses in self._models.items():
            for status in statuses:
                if status.state is not State.LOADING:
                    continue
                if model in self._serving:
                    status.state = State.NOT_LOADED
                    serving = self._serving[model].manifest.version
                    status.reason = f"version {serving} is served"
                else:
                    await self._load_one(status, by_model[model, status.version])
        self.loading = False
        self._changed()

    @property
    def ready(self) -> bool:
        """Whether loading is through and some model answers."""
        return not self.loading and bool(self._serving)

    def answers(self, name: str) -> bool | None:
        """Whether a version of the model answers; None where there is no such model."""
        return name in self._serving if name in self._models else None

    def find(self, name: str, version: int = 0) -> Ready:
        """The version that answers: the one named, or with 0 the model's. Raises as `status` does,
        and ModelNotReady."""
        ready = self._serving.get(name)
        if ready is not None and version in (0, ready.manifest.version):
            return ready
        status = self.status(name, version)
        detail = f": {status.reason}" if status.reason else ""
        state = status.state.name.lower().replace("_", " ")
        raise ModelNotReady(f"model {name!r} version {status.version} is {state}{detail}")

    def status(self, name: str, version: int = 0) -> Status:
        """One version, or with 0 the one that answers, or else the newest.

        Raises InvalidInput without a name, ModelNotFound with what there is.
        """
        if not name:
            raise InvalidInput("model", f"is empty; {self._known()}")
        if name not in self._models:
            raise ModelNotFound(f"there is no model {name[:80]!r}; {self._known()}")
        if version < 0:
            raise InvalidInput("version", f"is {version}; versions count from 1, 0 is the newest")
        statuses = self._models[name]
        if not version:
            return next((status for status in statuses if status.ready), statuses[0])
        for status in statuses:
            if status.version == version:
                return status
        known = _listed(str(status.version) for status in statuses)
        raise ModelNotFound(f"model {name!r} has no version {version}; it has {known}")

    def statuses(self) -> list[Status]:
        """All of them, by name, the newest version first."""
        return [status for name in sorted(self._models) for status in self._models[name]]

    def serving(self) -> list[Ready]:
        """The versions that answer."""
        return list(self._serving.values())

    async def unload_all(self) -> None:
        """Waits for what runs and closes every engine."""
        while self._serving:  # an engine may be given up while another one ends its work
            _, ready = self._serving.popitem()
            await ready.host.remove(ready.key)

    async def _load_one(self, status: Status, version: Version) -> None:
        loop = asyncio.get_running_loop()
        began_s = time.perf_counter()
        try:
            loaded = await loop.run_in_executor(self._loader, partial(self._load, version))
        except Unsound as error:
            self._fail(status, str(error))
            return
        except Exception as error:
            log.exception("load_failed", extra={"model": status.model, "version": status.version})
            self._fail(status, f"{type(error).__name__} while loading; the log has the details")
            return
        self._serve(status, version, loaded, time.perf_counter() - began_s)

    def _serve(self, status: Status, version: Version, loaded: Loaded, seconds: float) -> None:
        assert version.manifest is not None
        manifest, record = version.manifest, loaded.record
        host = self._host_for(loaded.engine)
        number = str(version.version)
        ready = status.ready = Ready(
            name=version.model,
            version_text=number,
            key=f"{version.model}/{number}",
            host=host,
            manifest=manifest,
            spec=manifest.input.spec(),
            labels=loaded.labels,
            engine=loaded.engine,
            record=record,
            metrics=self._metrics.model(version.model),
        )
        host.add(
            ready.key,
            loaded.engine,
            loaded.lanes,
            ready.metrics,
            failed=partial(self._fail, status),
            objective_s=manifest.objective_ms / 1e3,
            weight=manifest.share,
        )
        self._serving[version.model] = ready
        status.state, status.reason = State.READY, loaded.passed_over
        self._metrics.ready.labels(version.model, number).set(1)
        self._metrics.engine_info.labels(*_engine_info(ready)).set(1)
        fallback = self._metrics.engine_fallback.labels(version.model, number, record.backend)
        fallback.set(1 if loaded.passed_over else 0)
        self._metrics.engine_load.labels(version.model).set(seconds)
        self._changed()
        log.info(
            "model_ready",
            extra={
                "model": version.model,
                "version": version.version,
                "engine": record.name,
                "weights": _weights(manifest),
                "lanes": " ".join(f"{lane.count}x{lane.units}" for lane in loaded.lanes),
                "row_ms": loaded.lanes[0].profile(1) * 1e3,
                "seconds": seconds,
            },
        )

    def _fail(self, status: Status, reason: str) -> None:
        status.state, status.reason = State.FAILED, reason
        ready, status.ready = status.ready, None
        self._metrics.ready.labels(status.model, str(status.version)).set(0)
        if ready is not None and self._serving.get(status.model) is ready:
            del self._serving[status.model]
            self._metrics.engine_info.remove(*_engine_info(ready))
            self._metrics.engine_fallback.remove(*_engine_info(ready)[:3])
            self._changed()
        _log_failure(status)

    def _known(self) -> str:
        return f"there are {_listed(sorted(self._models))}" if self._models else "there are none"


def _listed(names: Iterable[str]) -> str:
    """The first of them; error messages must stay short enough for gRPC's trailers."""
    first = list(islice(names, LISTED + 1))
    return ", ".join(first[:LISTED]) + (", ..." if len(first) > LISTED else "")


def _engine_info(ready: Ready) -> tuple[str, ...]:
    """The labels of convserve_engine_info."""
    record = ready.record
    weights = _weights(ready.manifest)
    return ready.name, ready.version_text, record.backend, record.precision, weights


def _weights(manifest: Manifest) -> str:
    return "trained" if manifest.weights.trained else "untrained"


def _log_failure(status: Status) -> None:
    log.error(
        "version_failed",
        extra={"model": status.model, "version": status.version, "reason": status.reason},
    )
