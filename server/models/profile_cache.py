"""Latency profiles of the engines that were measured by this process."""

from __future__ import annotations

import time
from collections.abc import Hashable

from server.engines.base import Engine, Instance, infer, instances_by_units
from server.execution.device import profile_groups
from server.repository.manifest import EngineRecord, Manifest
from server.scheduling.base import InstanceGroup

# Least number and duration of the runs of a batch size.
MIN_RUNS = 3
MIN_RUN_S = 0.01


class ProfileCache:
    """Instance groups with their latency profiles. Used on the load thread only.

    The same network with other weights takes the same time. So a new version of a model is not
    measured again: the requests of the version before would slow the measurement down, and the
    profile would be too high for as long as the version is loaded.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[InstanceGroup]] = {}

    def instance_groups(
        self, engine: Engine, manifest: Manifest, record: EngineRecord
    ) -> list[InstanceGroup]:
        """The engine's instance groups; measures an engine that needs other computations."""
        key = _computation(engine, manifest, record)
        if key not in self._known:
            self._known[key] = profile_groups(engine, _measure)
        return self._known[key]


def _computation(engine: Engine, manifest: Manifest, record: EngineRecord) -> Hashable:
    """Everything that decides how long the engine takes. Its weights do not."""
    groups = tuple((group[0].units, len(group)) for group in instances_by_units(engine))
    return (
        *(manifest.architecture, manifest.parameters, manifest.classes, manifest.top_k),
        *(engine.instances[0].pixels.shape, groups),
        *(record.backend, record.backend_version, record.precision, record.hardware),
        *(record.min_batch, record.opt_batch),
    )


def _measure(instance: Instance, rows: int) -> float:
    """Seconds of a warm batch of `rows`: the minimum of a few runs.

    The profile is a lower bound, see `LatencyProfile`. A pause of the process while loading must
    not raise it for as long as the engine is loaded.
    """
    infer(instance, instance.pixels[:rows])
    seconds: list[float] = []
    while len(seconds) < MIN_RUNS or sum(seconds) < MIN_RUN_S:
        began = time.perf_counter()
        infer(instance, instance.pixels[:rows])
        seconds.append(time.perf_counter() - began)
    return min(seconds)
