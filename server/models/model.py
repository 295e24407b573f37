"""One model: its versions, and which of them get the requests that name no version.

The version policy selects the versions to keep loaded, labels select the stable version and the
canary. A new version is loaded beside the old one; requests switch to it in one step, and the old
version finishes those it has. If a version fails, the next older one is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice

from server.errors import InvalidInput, ModelNotFound
from server.models.changes import ChangeNotifier
from server.models.state import State
from server.models.version import ModelVersion
from server.repository.contents import VersionEntry
from server.repository.serving_config import VERSION_LABELS, ServingConfig, VersionPolicy
from server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_LISTED = 16  # names in an error message


class CanarySplit:
    """Gives a canary its fraction of the requests.

    A request ID always gets the same answer, so that retries reach the same version. Requests
    without an ID are spread evenly: at 25 % every fourth one goes to the canary.
    """

    def __init__(self) -> None:
        self._owed = 0.0  # requests without an ID that the canary should have got by now

    def takes(self, fraction: float, request_id: str) -> bool:
        """Whether the canary gets this request."""
        if request_id:
            digest = blake2b(request_id.encode(), digest_size=8).digest()
            return int.from_bytes(digest) < fraction * 2**64
        self._owed += fraction
        is_taken = self._owed >= 1
        self._owed -= is_taken
        return is_taken


class Model:
    """Versions of one model. Used on the event loop's thread only.

    A model that is not enabled keeps no version loaded. `changes` is notified when the model starts
    or stops answering requests.
    """

    def __init__(
        self,
        name: str,
        *,
        is_enabled: bool,
        default_policy: VersionPolicy,
        metrics: Metrics,
        changes: ChangeNotifier,
    ) -> None:
        self.name = name
        self.versions: list[ModelVersion] = []  # newest first
        self.is_enabled = is_enabled
        self.stable: ModelVersion | None = None
        self.canary: ModelVersion | None = None
        self._config = ServingConfig()
        self._default_policy = self._policy = default_policy
        self._metrics = metrics
        self._changes = changes
        self._last_stable: ModelVersion | None = None  # kept when there is no stable version
        self._canary_split = CanarySplit()

    # --- lookups -------------------------------------------------------------------------------

    def route(self, request_id: str) -> ModelVersion:
        """The version for a request that names none: the canary gets its percentage.

        Returns the newest version if none is loaded.
        """
        if self.canary is not None and self._config.canary_percent:
            fraction = self._config.canary_percent / 100
            if self._canary_split.takes(fraction, request_id):
                return self.canary
        return self.stable or self.versions[0]

    def version(self, number: int = 0, label: str = "") -> ModelVersion:
        """The version with a number or a label; else the stable one, or the newest.

        Raises InvalidInput, ModelNotFound.
        """
        if label:
            if number:
                raise InvalidInput("label", "is set together with a version; set only one of them")
            number = self._labelled(label)
        if not number:
            return self.stable or self.versions[0]
        for version in self.versions:
            if version.number == number:
                return version
        known = list_names(str(version.number) for version in self.versions)
        raise ModelNotFound(f"model {self.name!r} has no version {number}; it has {known}")

    def labels(self, version: ModelVersion) -> list[str]:
        """The labels that select this version now."""
        return [
            label
            for label in VERSION_LABELS
            if self._config.version(label) == version.number
            or (label == "stable" and self.stable is version and label not in self._config.labels)
        ]

    def _labelled(self, label: str) -> int:
        if label not in VERSION_LABELS:
            raise InvalidInput(
                "label", f"is {label[:80]!r}; {' or '.join(VERSION_LABELS)} is allowed"
            )
        number = self._config.version(label)
        if not number and label == "stable" and self.stable is not None:
            return self.stable.number
        if not number:
            raise ModelNotFound(f"model {self.name!r} has no version labelled {label!r}")
        return number

    # --- what should be loaded -----------------------------------------------------------------

    def update(self, published: Sequence[VersionEntry], config: ServingConfig | None) -> None:
        """Takes over what the repository holds now; without a config the last one stays valid."""
        if config is not None:
            self._config, self._policy = config, config.policy(self._default_policy)
        elif not self.versions:
            self._policy = self._default_policy
        missing = {version.number: version for version in self.versions}
        for one in published:
            version = missing.pop(one.version, None)
            if version is None:
                version = ModelVersion(one, self._metrics)
                self.versions.append(version)
            version.update(one)
        for version in missing.values():
            version.mark_removed()
        self.forget_removed()
        self.versions.sort(key=lambda version: -version.number)

    def forget_removed(self) -> None:
        """Drops versions that the repository no longer holds, unless they are still loaded."""
        for version in [one for one in self.versions if one.is_removed and not one.loaded]:
            self.versions.remove(version)
            version.forget_metrics()

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        """Stops requests to the model at once. Its versions stay loaded until they are unloaded."""
        self.is_enabled = False
        self.assign_requests()

    def allow_retry(self) -> None:
        """Lets every failed version be loaded again."""
        for version in self.versions:
            if version.state is State.FAILED and version.manifest and not version.loaded:
                version.allow_retry()

    def loaded_versions(self) -> list[ModelVersion]:
        return [version for version in self.versions if version.loaded]

    def selected_versions(self) -> list[ModelVersion]:
        """The valid versions that policy and labels select, newest first."""
        if not self.is_enabled:
            return []
        valid = [
            version
            for version in self.versions
            if version.state is not State.FAILED and not version.rejection
        ]
        # A repository that can't be reached for a while looks empty. So removed versions go on
        # serving as long as there is nothing else.
        valid = [version for version in valid if not version.is_removed] or [
            version for version in valid if version.loaded
        ]
        canary = self._config.version("canary")  # has its own label, so the policy skips it
        numbers = [version.number for version in valid if version.number != canary]
        selected = {*self._config.labels.values(), *self._policy.choose(numbers)}
        return [version for version in valid if version.number in selected]

    def why_not_loaded(self) -> str:
        """Why a valid version of the model is not loaded."""
        if not self.is_enabled:
            return "it is loaded only on request"
        if self.stable is None:
            return "the version policy selects other versions"
        return f"version {self.stable.number} is served"

    # --- who gets requests ---------------------------------------------------------------------

    def assign_requests(self) -> None:
        """Chooses the stable version and the canary among the loaded versions.

        This is one step for requests: each goes either to the old choice or to the new one.
        """
        candidates = self._candidates()
        old_canary, was_serving = self.canary, self.stable is not None
        by_number = {version.number: version for version in candidates}
        canary = by_number.get(self._config.version("canary"))
        self.stable = by_number.get(self._config.version("stable")) or next(
            (version for version in candidates if version is not canary), canary
        )
        self.canary = canary if canary is not self.stable else None
        for version in self.loaded_versions():
            if version in candidates:
                version.resume()
            elif not self.is_enabled or (version.rejection and self.stable is not None):
                version.drain(version.rejection or self.why_not_loaded())
        if self.stable is not None:
            self._report_switch(self.stable, old_canary)
        if was_serving != (self.stable is not None):
            self._changes.notify()

    def roll_back(self, version: ModelVersion, reason: str, cause: str, *, stop_now: bool) -> bool:
        """Rejects a version that serves. Returns False if it keeps serving.

        It keeps serving if no other version is usable. It also keeps serving while the other
        version is loading, unless `stop_now`.
        """
        has_other = any(one.can_serve for one in self.versions if one is not version)
        if version.rejection or version.state is not State.READY or not (has_other or stop_now):
            return False
        version.reject(reason, cause, stop_now=stop_now)
        self.assign_requests()
        return True

    def _candidates(self) -> list[ModelVersion]:
        """Loaded versions that may be stable or canary: the selected ones.

        Until one of those is loaded, the loaded versions keep serving.
        """
        selected = [version for version in self.selected_versions() if version.loaded]
        if selected or not self.is_enabled:
            return selected
        loaded = self.loaded_versions()
        return [version for version in loaded if not version.rejection] or [
            version for version in loaded if version.state is State.READY
        ]

    def _report_switch(self, stable: ModelVersion, old_canary: ModelVersion | None) -> None:
        """Counts and logs that requests go to another version than before."""
        last, self._last_stable = self._last_stable, stable
        if last is not None and last is not stable:
            self._metrics.version_switches.labels(self.name).inc()
            if last.rollback_cause:
                self._report_rollback(last, stable)
            else:
                log.info("version_switched", extra=last.log_fields(to=stable.number))
        if old_canary is not None and old_canary is not self.canary and old_canary.rollback_cause:
            self._report_rollback(old_canary, stable)

    def _report_rollback(self, rejected: ModelVersion, stable: ModelVersion) -> None:
        self._metrics.rollbacks.labels(self.name, rejected.take_rollback_cause()).inc()
        reason = rejected.rejection or rejected.reason
        log.error("version_rolled_back", extra=rejected.log_fields(to=stable.number, reason=reason))


def missing_model(name: str, known: Iterable[str]) -> InvalidInput | ModelNotFound:
    """The error for a name that is empty, or that no model of the known names has."""
    listed = f"known models: {list_names(known) or 'none'}"
    if not name:
        return InvalidInput("model", f"is empty; {listed}")
    return ModelNotFound(f"there is no model {name[:80]!r}; {listed}")


def list_names(names: Iterable[str]) -> str:
    """The first names, separated by commas. Error messages must fit into gRPC's trailers."""
    first = list(islice(names, MAX_LISTED + 1))
    return ", ".join(first[:MAX_LISTED]) + (", ..." if len(first) > MAX_LISTED else "")
