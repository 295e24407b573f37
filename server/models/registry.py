"""What the server serves: each version it knows of, where it stands, and which calls it gets.

A model's policy says which of its sound versions are loaded, its labels which of those gets a
call that names none. A version that is to take another's place is loaded beside it; calls move in
one step once it has proved itself, and the old one finishes what it has. Where a version fails, the
next older one is tried, so what was sound goes on serving. Every version that does not answer says
why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import groupby, islice
from typing import NamedTuple

from msgspec.structs import replace

from server.engines.base import Engine
from server.errors import InvalidInput, ModelNotFound, ModelNotReady
from server.execution.device import DeviceExecutor
from server.images.input_spec import InputSpec
from server.models.changes import ChangeNotifier
from server.models.loader import LoadedEngine
from server.models.rollback import CallCounts, RollbackPolicy
from server.models.state import State, VersionState
from server.repository.contents import VersionEntry
from server.repository.manifest import EngineRecord, InvalidVersion, Manifest
from server.repository.serving_config import (
    SERVE_LATEST,
    VERSION_LABELS,
    ServingConfig,
    VersionPolicy,
)
from server.telemetry.clock import clock
from server.telemetry.metrics import Metrics, ModelMetrics

log = logging.getLogger(__name__)

LISTED = 16  # names in an error message
DRAIN_S = 30.0  # that calls have to leave a version which takes no new ones; then they are refused

REPLACED = (
    "its folder holds another network than the one that answers; publish it as a new version, or "
    "start the server anew"
)

Load = Callable[[VersionEntry, Callable[[], None]], LoadedEngine]


class LoadedModel(NamedTuple):
    """A loaded version: all that an RPC needs of it."""

    name: str
    version_text: str
    key: str  # its name at its host
    executor: DeviceExecutor
    manifest: Manifest
    spec: InputSpec
    labels: tuple[str, ...]
    engine: Engine
    record: EngineRecord
    metrics: ModelMetrics

    def counted(self) -> CallCounts:
        """What was counted of its calls."""
        totals = self.metrics.totals
        return CallCounts(totals.calls, totals.late_calls)


@dataclass(slots=True, eq=False)
class ModelVersion:
    """A version and where it stands."""

    found: VersionEntry  # as it lay in the repository when last looked at
    life: VersionState
    loaded: LoadedModel | None = None
    probation: RollbackPolicy | None = None
    before: ModelVersion | None = None  # kept loaded while this one is on probation
    given_up: str = ""  # why it must not be served, though it still may
    passed_over: str = ""  # the better engines of the version, and why they do not serve
    cause: str = ""  # of giving it up, as convserve_rollbacks counts it
    gone: bool = False  # from the repository

    @property
    def model_name(self) -> str:
        return self.found.model

    @property
    def number(self) -> int:
        return self.found.version

    @property
    def manifest(self) -> Manifest | None:
        return self.found.manifest

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def reason(self) -> str:
        return self.life.reason

    @property
    def ready_model(self) -> LoadedModel | None:
        """What answers calls; None where it does not."""
        return self.loaded if self.state is State.READY else None


@dataclass(slots=True, eq=False)
class _Model:
    """The versions of a model, and those that get the calls which name none."""

    name: str
    statuses: list[ModelVersion] = field(default_factory=list)  # newest first
    plan: ServingConfig = field(default_factory=ServingConfig)
    policy: VersionPolicy = SERVE_LATEST
    wanted: bool = True  # unless it was unloaded by request
    stable: ModelVersion | None = None
    canary: ModelVersion | None = None
    last: ModelVersion | None = None  # the stable one, or the one that was, until there is another
    owed: float = 0.0  # calls that the canary is owed, of those that can't be told apart

    def loaded(self) -> list[ModelVersion]:
        return [status for status in self.statuses if status.loaded]

    def eligible(self) -> list[ModelVersion]:
        """The sound versions that policy and labels ask for, the newest first."""
        if not self.wanted:
            return []
        sound = [
            status
            for status in self.statuses
            if status.state is not State.FAILED and not status.given_up
        ]
        # What was taken away is served only where nothing else is there: a repository that can't be
        # reached for a while looks empty.
        sound = [status for status in sound if not status.gone] or [
            status for status in sound if status.loaded
        ]
        labelled = {*self.plan.labels.values()}
        canary = self.plan.version("canary")  # is not what most calls are to get
        usual = [status.number for status in sound if status.number != canary]
        chosen = labelled | {*self.policy.choose(usual)}
        return [status for status in sound if status.number in chosen]


class ModelRegistry:
    """The versions known and those that answer. Used on the event loop's thread only.

    `load` blocks and runs on the loader's thread, one version at a time; there it calls what it is
    given once an engine is there to be checked. `host_for` gives the host of an engine's device;
    `changes` notifies whenever a model, or the registry as a whole, begins or ceases to answer.
    Versions that began to answer are on probation for `bake_time_s`; models not `wanted` are loaded
    by request only. `tend` is run by whoever owns the registry and ends when cancelled.
    """

    def __init__(
        self,
        *,
        load: Load,
        loader: Executor,
        host_for: Callable[[Engine], DeviceExecutor],
        metrics: Metrics,
        changes: ChangeNotifier,
        policy: VersionPolicy = SERVE_LATEST,
        bake_time_s: float = 0.0,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._load = load
        self._loader = loader
        self._host_for = host_for
        self._metrics = metrics
        self._changes = changes
        self._policy = policy
        self._bake_time_s = bake_time_s
        self._wanted = wanted
        self._models: dict[str, _Model] = {}
        self._changing = asyncio.Lock()  # versions come and go one at a time
        self._unsettled = asyncio.Event()
        self._told: object = None  # what `changes` last notified of
        self.is_loading = True  # until the first `follow` is through

    # --- what there is -----------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether loading is through and some model answers."""
        return not self.is_loading and any(model.stable for model in self._models.values())

    def is_serving(self, name: str) -> bool | None:
        """Whether a version of the model answers; None where there is no such model."""
        return self._models[name].stable is not None if name in self._models else None

    def route(
        self, name: str, version: int = 0, label: str = "", request_id: str = ""
    ) -> LoadedModel:
        """The version that answers: the one named or labelled, or else the model's.

        The model's canary gets its percentage of the calls that name none: the same `request_id`
        always goes to the same of the two. Raises as `status` does, and ModelNotReady.
        """
        model = self._models.get(name)
        if model is None or version or label:
            status = self.version(name, version, label)
        else:
            status = self._unnamed(model, request_id) or model.statuses[0]
        return _answering(status)

    def resolve(self, name: str, version: int = 0, label: str = "") -> LoadedModel:
        """The version that answers, for who asks about it; that is no call for a canary to get.
        Raises as `find` does."""
        return _answering(self.version(name, version, label))

    def version(self, name: str, version: int = 0, label: str = "") -> ModelVersion:
        """One version, by number or label; or else the one that answers, or the newest.

        Raises InvalidInput without a name, ModelNotFound with what there is.
        """
        if not name:
            raise InvalidInput("model", f"is empty; {self._known()}")
        if name not in self._models:
            raise ModelNotFound(f"there is no model {name[:80]!r}; {self._known()}")
        if version < 0:
            raise InvalidInput("version", f"is {version}; versions count from 1, 0 is the newest")
        model = self._models[name]
        if label:
            if version:
                raise InvalidInput("label", "is given, and a version too; give one of them")
            version = self._labelled(model, label)
        if not version:
            return model.stable or model.statuses[0]
        for status in model.statuses:
            if status.number == version:
                return status
        known = _listed(str(status.number) for status in model.statuses)
        raise ModelNotFound(f"model {name!r} has no version {version}; it has {known}")

    def labels(self, status: ModelVersion) -> list[str]:
        """The labels that lead to this version now."""
        model = self._models[status.model_name]
        return [
            label
            for label in VERSION_LABELS
            if model.plan.version(label) == status.number
            or (label == "stable" and model.stable is status and label not in model.plan.labels)
        ]

    def versions(self) -> list[ModelVersion]:
        """All of them, by name, the newest version first."""
        return [status for name in sorted(self._models) for status in self._models[name].statuses]

    def serving_models(self) -> list[LoadedModel]:
        """The versions that answer."""
        return [status.ready_model for status in self.versions() if status.ready_model]

    def queued_rows(self) -> dict[str, int]:
        """Rows queued for each model that is loaded."""
        rows: dict[str, int] = {}
        for status in self.versions():
            if status.loaded is not None:
                waiting = status.loaded.executor.queued_rows(status.loaded.key)
                rows[status.model_name] = rows.get(status.model_name, 0) + waiting
        return rows

    # --- what changes it ---------------------------------------------------------------------

    async def sync(self, found: Iterable[VersionEntry], plans: Mapping[str, ServingConfig]) -> None:
        """Serves what lies in the repository now: loads what is new and wanted, one version after
        the other, moves calls to it, and unloads what is wanted no more."""
        async with self._changing:
            groups = {
                model: list(group) for model, group in groupby(found, key=lambda one: one.model)
            }
            for name in [*groups, *(self._models.keys() - groups)]:
                self._take_in(name, groups.get(name, []), plans.get(name))
            for model in list(self._models.values()):
                await self._settle(model)
            self.is_loading = False
            self._announce()

    async def load(
        self, name: str, found: Sequence[VersionEntry], plan: ServingConfig | None
    ) -> None:
        """Serves one model as it lies in the repository now, failed versions tried again.

        Raises ModelNotFound where there is none, ModelNotReady where its newest version can't be
        served; an older one may be.
        """
        async with self._changing:
            self._take_in(name, found, plan)
            if name not in self._models:
                raise ModelNotFound(f"there is no model {name[:80]!r}; {self._known()}")
            model = self._models[name]
            for status in model.statuses:
                if status.state is State.FAILED and status.manifest and not status.loaded:
                    status.life.to(State.UNAVAILABLE)
                    status.given_up = ""
            model.wanted = True
            await self._settle(model)
            for status in model.statuses:
                if status.state is State.FAILED:
                    going_on = f"; version {model.stable.number} answers" if model.stable else ""
                    raise ModelNotReady(
                        f"model {name!r} version {status.number} can't be loaded: "
                        f"{status.reason}{going_on}"
                    )
                if status.state is State.READY:
                    break

    async def unload(self, name: str) -> None:
        """Takes a model's calls away at once and unloads it once those it has are answered.

        Raises ModelNotFound.
        """
        model = self._models[self.version(name).model_name]
        model.wanted = False
        self._direct(model)
        async with self._changing:
            if self._models.get(name) is model:
                model.wanted = False  # a load that waited before this one has asked for it again
                await self._settle(model)

    def roll_back(
        self, status: ModelVersion, reason: str, cause: str, *, wrong: bool = False
    ) -> None:
        """Goes back to another version from one that answered. Where no other is loaded this one
        answers until one is, unless its answers are `wrong`; where there is none at all, it stays.
        """
        model = self._models[status.model_name]
        others = [one for one in model.statuses if one is not status and _usable(one)]
        if status.given_up or status.state is not State.READY or not (others or wrong):
            return
        status.given_up, status.cause = reason, cause
        if wrong:
            status.life.to(State.DRAINING, reason)
        log.error("version_given_up", extra=_named(status, reason=reason, cause=cause))
        self._direct(model)
        self._unsettled.set()

    def check_bake_times(self, now_s: float) -> None:
        """Looks at every version that is on probation: gives up the bad, ends what is over."""
        for status in self.versions():
            probation = status.probation
            if probation is None or status.loaded is None:
                continue
            if objection := probation.objection(status.loaded.counted()):
                self.roll_back(status, objection, "objective")
            elif probation.over(now_s):
                status.probation = status.before = None
                self._unsettled.set()  # the version before need not be kept any longer

    async def reconcile_forever(self) -> None:
        """Loads and unloads what the versions' failures and the end of their probations ask for."""
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            async with self._changing:
                for model in list(self._models.values()):
                    await self._settle(model)

    async def unload_all(self) -> None:
        """Waits for what runs and closes every engine."""
        for status in self.versions():
            ready = status.loaded
            if ready is not None:
                await ready.executor.remove(ready.key)
                status.loaded = None

    # --- how ---------------------------------------------------------------------------------

    def _take_in(
        self, name: str, found: Sequence[VersionEntry], plan: ServingConfig | None
    ) -> None:
        """Brings what is known of a model up to date."""
        model = self._models.setdefault(name, _Model(name, wanted=self._wanted(name)))
        if plan is not None:
            model.plan, model.policy = plan, plan.policy(self._policy)
        elif not model.statuses:
            model.policy = self._policy
        known = {status.number: status for status in model.statuses}
        for version in found:
            status = known.pop(version.version, None)
            if status is None:
                status = self._new(version)
                model.statuses.append(status)
            status.gone = False
            if status.loaded is None and (status.found != version or not version.manifest):
                self._look_again(status, version)
            elif (status.reason == REPLACED) != _other_content(status.found, version):
                if status.reason == REPLACED:  # what was loaded lies there again
                    status.life.to(status.state, status.passed_over)
                else:
                    log.error("version_replaced", extra=_named(status, reason=REPLACED))
                    status.life.to(status.state, REPLACED)
        for status in known.values():
            status.gone = True
            if not status.loaded:
                model.statuses.remove(status)
                self._forget_metrics(status)
        model.statuses.sort(key=lambda status: -status.number)
        if not model.statuses:
            del self._models[name]

    def _new(self, version: VersionEntry) -> ModelVersion:
        status = ModelVersion(
            version, VersionState(told=lambda life, old: self._moved(status, old))
        )
        self._show(status)
        return status

    def _look_again(self, status: ModelVersion, version: VersionEntry) -> None:
        """A version that is not loaded has changed, or is new."""
        status.found = version
        if version.manifest is None and version.reason != status.reason:
            if status.state is State.FAILED:
                status.life.to(State.UNAVAILABLE)
            self._fail(status, version.reason)
        elif version.manifest is not None and status.state is State.FAILED:
            status.life.to(State.UNAVAILABLE)
            status.given_up = status.cause = ""

    async def _settle(self, model: _Model) -> None:
        """Loads what is missing, then unloads what is too much."""
        self._direct(model)
        while missing := [status for status in model.eligible() if not status.loaded]:
            await self._load_one(model, missing[0])
        self._direct(model)
        eligible = model.eligible()
        kept = {one.before: one for one in eligible if one.loaded and one.before}
        why = _why_not(model)
        for status in model.statuses:
            if status in eligible:
                continue
            if not status.loaded:
                if status.state in (State.UNAVAILABLE, State.UNLOADED):
                    status.life.to(status.state, why)
            elif status in kept and not status.given_up and not status.gone:
                self._stop_calls(status, f"{why}; this one is kept until that has proved itself")
            elif status is not model.stable:
                await self._unload(status, status.given_up or why)
        for status in [status for status in model.statuses if status.gone and not status.loaded]:
            model.statuses.remove(status)
            self._forget_metrics(status)

    def _direct(self, model: _Model) -> None:
        """Chooses, of the loaded versions, who gets the calls that name none. One step: no call is
        between the old and the new."""
        eligible = model.eligible()
        answering = [status for status in eligible if status.loaded]
        if not answering and model.wanted:  # what is to be served is not there yet: what is there
            usable = [status for status in model.loaded() if not status.given_up]
            answering = usable or [one for one in model.loaded() if one.state is State.READY]
        by_version = {status.number: status for status in answering}
        canary = by_version.get(model.plan.version("canary"))
        stable = by_version.get(model.plan.version("stable")) or next(
            (status for status in answering if status is not canary), canary
        )
        before = model.canary
        model.stable, model.canary = stable, canary if canary is not stable else None
        for status in model.loaded():
            if status in answering:
                if status.state is State.DRAINING:
                    status.life.to(State.READY, status.passed_over)
            elif not model.wanted or (status.given_up and stable is not None):
                self._stop_calls(status, status.given_up or _why_not(model))
        if stable is not None and stable is not model.last:
            self._note_move(model, stable)
        if (
            stable is not None
            and before is not None
            and before is not model.canary
            and before.cause
        ):
            self._note_rollback(before, stable)
        self._announce()

    def _note_move(self, model: _Model, stable: ModelVersion) -> None:
        """Says that a model's calls go to another version than before."""
        last, model.last = model.last, stable
        if last is None:
            return
        self._metrics.version_switches.labels(model.name).inc()
        if last.cause:
            self._note_rollback(last, stable)
        else:
            log.info("calls_moved", extra=_named(last, to=stable.number))

    def _note_rollback(self, given_up: ModelVersion, stable: ModelVersion) -> None:
        self._metrics.rollbacks.labels(given_up.model_name, given_up.cause).inc()
        reason = given_up.given_up or given_up.reason
        log.error("rolled_back", extra=_named(given_up, to=stable.number, reason=reason))
        given_up.cause = ""

    def _stop_calls(self, status: ModelVersion, reason: str) -> None:
        if status.state in (State.READY, State.DRAINING):
            status.life.to(State.DRAINING, reason)

    def _unnamed(self, model: _Model, request_id: str) -> ModelVersion | None:
        """Who gets a call that names no version."""
        if model.canary is None or not model.plan.canary_percent:
            return model.stable
        share = model.plan.canary_percent / 100
        if request_id:
            digest = blake2b(request_id.encode(), digest_size=8).digest()
            chosen = int.from_bytes(digest) < share * 2**64
        else:  # they can't be told apart: one in so many
            model.owed += share
            chosen = model.owed >= 1
            model.owed -= chosen
        return model.canary if chosen else model.stable

    def _labelled(self, model: _Model, label: str) -> int:
        if label not in VERSION_LABELS:
            raise InvalidInput(
                "label", f"is {label[:80]!r}; {' or '.join(VERSION_LABELS)} is allowed"
            )
        version = model.plan.version(label)
        if not version and label == "stable" and model.stable is not None:
            return model.stable.number
        if not version:
            raise ModelNotFound(f"model {model.name!r} has no version labelled {label!r}")
        return version

    async def _load_one(self, model: _Model, status: ModelVersion) -> None:
        loop = asyncio.get_running_loop()
        began_s = time.perf_counter()
        status.life.to(State.LOADING)

        def checked() -> None:
            if status.state is State.LOADING:
                status.life.to(State.CHECKING)

        def checking() -> None:  # on the loader's thread
            loop.call_soon_threadsafe(checked)

        try:
            loaded = await loop.run_in_executor(
                self._loader, partial(self._load, status.found, checking)
            )
        except InvalidVersion as error:
            self._fail(status, str(error))
            return
        except Exception as error:
            log.exception("load_failed", extra=_named(status))
            self._fail(status, f"{type(error).__name__} while loading; the log has the details")
            return
        self._serve(model, status, loaded, time.perf_counter() - began_s)

    def _serve(
        self, model: _Model, status: ModelVersion, loaded: LoadedEngine, seconds: float
    ) -> None:
        manifest, record = status.manifest, loaded.record
        assert manifest is not None
        host = self._host_for(loaded.engine)
        number = str(status.number)
        objective_s = manifest.objective_ms / 1e3
        ready = status.loaded = LoadedModel(
            name=model.name,
            version_text=number,
            key=f"{model.name}/{number}",
            executor=host,
            manifest=manifest,
            spec=manifest.input.spec(),
            labels=loaded.labels,
            engine=loaded.engine,
            record=record,
            metrics=self._metrics.model(model.name, objective_s),
        )
        host.add(
            ready.key,
            loaded.engine,
            loaded.groups,
            ready.metrics,
            on_engine_failed=partial(self._stalled, status),
            objective_s=objective_s,
            weight=manifest.share,
            on_batch_failed=partial(self._erred, status),
        )
        self._metrics.engine_info.labels(*_engine_info(ready)).set(1)
        for method in (
            "Classify",
            "ModelInfer",
            "ModelStreamInfer",
        ):  # from 0, so that the first failure is seen
            self._metrics.requests.labels(model.name, number, method, "INTERNAL")
        fallback = self._metrics.engine_fallback.labels(model.name, number, record.backend)
        fallback.set(1 if loaded.passed_over else 0)
        self._metrics.engine_load.labels(model.name).set(seconds)
        status.given_up = status.cause = ""
        status.passed_over = loaded.passed_over
        if self._bake_time_s:
            status.before = model.stable
            before = model.stable.loaded.counted() if model.stable and model.stable.loaded else None
            status.probation = RollbackPolicy(clock() + self._bake_time_s, objective_s, before)
        status.life.to(State.READY, loaded.passed_over)
        self._direct(model)
        log.info(
            "model_ready",
            extra=_named(
                status,
                engine=record.name,
                weights=_weights(manifest),
                instance_groups=" ".join(f"{group.count}x{group.units}" for group in loaded.groups),
                row_ms=loaded.groups[0].profile(1) * 1e3,
                seconds=seconds,
            ),
        )

    async def _unload(self, status: ModelVersion, reason: str) -> None:
        """Lets a version finish the calls it has, and closes its engine."""
        ready = status.loaded
        assert ready is not None
        self._stop_calls(status, reason)
        try:
            async with asyncio.timeout(DRAIN_S):
                await ready.executor.drain(ready.key, lambda: status.state is State.DRAINING)
        except TimeoutError:
            rows = ready.executor.queued_rows(ready.key)
            log.warning("drain_cut_short", extra=_named(status, waiting=rows, seconds=DRAIN_S))
        if status.loaded is None or status.state is not State.DRAINING:  # stalled, or wanted again
            return
        await ready.executor.remove(ready.key)
        if status.loaded is not None:
            self._closed(status)
            if status.given_up:
                self._fail(status, status.given_up)
            else:
                status.life.to(State.UNLOADED, reason)
                log.info("version_unloaded", extra=_named(status, reason=reason))

    def _erred(self, status: ModelVersion, reason: str) -> None:
        """A batch of a version failed."""
        if status.probation is not None and not status.probation.over(clock()):
            self.roll_back(
                status, f"within its probation a batch failed: {reason}", "engine_failure"
            )

    def _stalled(self, status: ModelVersion, reason: str) -> None:
        """Its host has given a version up; nothing can be closed, something may still run in it."""
        self._closed(status)
        status.cause = "stalled"
        self._fail(status, reason)
        self._direct(self._models[status.model_name])
        self._unsettled.set()

    def _closed(self, status: ModelVersion) -> None:
        ready, status.loaded = status.loaded, None
        status.probation = status.before = None
        if ready is not None:
            self._metrics.engine_info.remove(*_engine_info(ready))
            self._metrics.engine_fallback.remove(*_engine_info(ready)[:3])

    def _fail(self, status: ModelVersion, reason: str) -> None:
        status.life.to(State.FAILED, reason)
        log.error("version_failed", extra=_named(status, reason=reason))

    def _moved(self, status: ModelVersion, old: State) -> None:
        """A version went from the state `old` to another one."""
        self._show(status)
        log.debug("version_moved", extra=_named(status, old=old.name, state=status.state.name))

    def _show(self, status: ModelVersion) -> None:
        name, number = status.model_name, str(status.number)
        self._metrics.ready.labels(name, number).set(status.state is State.READY)
        for state in State:
            series = self._metrics.state.labels(name, number, state.name)
            series.set(status.state is state)

    def _forget_metrics(self, status: ModelVersion) -> None:
        name, number = status.model_name, str(status.number)
        self._metrics.ready.remove(name, number)
        for state in State:
            self._metrics.state.remove(name, number, state.name)

    def _announce(self) -> None:
        """Has `changed` called where anybody would now be told something else."""
        told = self.is_ready, {name for name, model in self._models.items() if model.stable}
        if told != self._told:
            self._told = told
            self._changes.notify()

    def _known(self) -> str:
        return f"there are {_listed(sorted(self._models))}" if self._models else "there are none"


def _other_content(loaded: VersionEntry, found: VersionEntry) -> bool:
    """Whether a version's folder holds another network than the one that was loaded from it. It may
    get further engines of the same."""
    if loaded.manifest is None or found.manifest is None:
        return False
    return replace(loaded.manifest, engines=()) != replace(found.manifest, engines=())


def _answering(status: ModelVersion) -> LoadedModel:
    if status.ready_model is not None:
        return status.ready_model
    detail = f": {status.reason}" if status.reason else ""
    state = status.state.name.lower()
    raise ModelNotReady(f"model {status.model_name!r} version {status.number} is {state}{detail}")


def _why_not(model: _Model) -> str:
    """Why a sound version of the model is not loaded."""
    if not model.wanted:
        return "it is loaded by request only"
    if model.stable is None:
        return "the version policy asks for other ones"
    return f"version {model.stable.number} is served"


def _usable(status: ModelVersion) -> bool:
    """Whether calls could go to a version, once it is loaded."""
    return status.state is not State.FAILED and not status.given_up and not status.gone


def _listed(names: Iterable[str]) -> str:
    """The first of them; error messages must stay short enough for gRPC's trailers."""
    first = list(islice(names, LISTED + 1))
    return ", ".join(first[:LISTED]) + (", ..." if len(first) > LISTED else "")


def _named(status: ModelVersion, **more: object) -> dict[str, object]:
    """What a log says of a version."""
    return {"model": status.model_name, "version": status.number, **more}


def _engine_info(ready: LoadedModel) -> tuple[str, ...]:
    """The labels of convserve_engine_info."""
    record = ready.record
    weights = _weights(ready.manifest)
    return ready.name, ready.version_text, record.backend, record.precision, weights


def _weights(manifest: Manifest) -> str:
    return "trained" if manifest.weights.trained else "untrained"
