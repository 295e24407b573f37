"""Follows the repository: tells the registry what lies there, when it changes or somebody asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from watchfiles import Change, awatch

from server.errors import ModelNotReady
from server.models.registry import ModelRegistry
from server.repository.contents import RepositoryContents, list_contents
from server.repository.manifest import MODEL_NAME
from server.telemetry.clock import clock

log = logging.getLogger(__name__)

# However it is with notifications (network file systems give none), we look again after so long.
RESCAN_S = 10.0
TURN_S = 0.5  # of the watcher: what changed before it began is seen after its first
STEP_MS = 100  # what changes within this is one change
DEBOUNCE_MS = 500

UNREADABLE = "repository_unreadable"


class RepositoryWatcher:
    """Brings a registry in line with a repository. The `reader` looks at the files.

    `serves` says which models are the server's business.
    """

    def __init__(
        self, root: Path, registry: ModelRegistry, reader: Executor, serves: Callable[[str], bool]
    ) -> None:
        self._root = root
        self._registry = registry
        self._reader = reader
        self._serves = serves
        self._told: set[str] = set()  # what was logged of the repository already
        self._asked: dict[str, object] = {}  # the latest request to load each model, not begun yet
        self._working: set[asyncio.Task[None]] = set()  # at what callers have asked for

    async def watch(self) -> None:
        """Serves what is published, for as long as it is not cancelled."""
        async for _ in changes(self._root):
            found = await self._look()
            if found is not None:
                versions = [version for version in found.versions if self._serves(version.model)]
                await self._registry.sync(versions, found.configs)

    async def load(self, model: str) -> None:
        """Serves a model as it lies there now. Goes on though the caller leaves. Raises as
        `ModelRegistry.load` does."""
        request = self._asked[model] = object()
        await self._to_its_end(self._load(model, request))

    async def unload(self, model: str) -> None:
        """Stops serving a model. Goes on though the caller leaves. Raises as `ModelRegistry.unload`
        does."""
        self._asked.pop(model, None)
        await self._to_its_end(self._registry.unload(model))

    def stop(self) -> None:
        """Lets go of what callers have asked for: nothing is served any more."""
        for task in self._working:
            task.cancel()

    async def _load(self, model: str, request: object) -> None:
        found = await self._look() if MODEL_NAME.fullmatch(model) else None
        if model not in self._asked:
            raise ModelNotReady(f"model {model!r} was to be unloaded before it was loaded")
        if self._asked[model] is request:
            del self._asked[model]
        versions = found.versions if found is not None else []
        plan = found.configs.get(model) if found is not None else None
        mine = [version for version in versions if version.model == model]
        await self._registry.load(model, mine, plan)

    async def _to_its_end(self, change: Coroutine[None, None, None]) -> None:
        """A change of what is served that was cut off would leave versions in between for good."""
        task = asyncio.ensure_future(change)
        self._working.add(task)
        task.add_done_callback(self._worked)
        await asyncio.shield(task)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("not_changed", extra={"reason": str(error)})  # whoever waits is told

    async def _look(self) -> RepositoryContents | None:
        """None where the repository can't be read: then all stays as it is."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._reader, partial(list_contents, self._root))
        except OSError as error:
            self._tell(UNREADABLE, str(self._root), str(error.strerror))
            return None
        self._told = {told for told in self._told if not told.startswith(UNREADABLE)}
        for stray in found.ignored:
            self._tell("passed_over", str(stray.path), stray.reason)
        return found

    def _tell(self, event: str, path: str, reason: str) -> None:
        """Logs something of the repository, once."""
        if f"{event} {path} {reason}" not in self._told:
            self._told.add(f"{event} {path} {reason}")
            log.warning(event, extra={"path": path, "reason": reason})


async def changes(root: Path) -> AsyncIterator[None]:
    """Yields at once, soon after something changes under `root`, and every RESCAN_S anyhow."""
    yield

    def told(change: Change, path: str) -> bool:
        """Not what writers are still at, which is hidden."""
        try:
            return not any(part.startswith(".") for part in Path(path).relative_to(root).parts)
        except ValueError:
            return True

    due_s = 0.0
    while True:
        try:
            async for changed in awatch(
                root,
                watch_filter=told,
                step=STEP_MS,
                debounce=DEBOUNCE_MS,
                rust_timeout=round(TURN_S * 1e3),
                yield_on_timeout=True,
            ):
                if changed or clock() >= due_s:
                    yield
                    due_s = clock() + RESCAN_S
        except (OSError, RuntimeError) as error:  # no watches left, the folder is away, ...
            log.warning("watching_by_looking", extra={"path": str(root), "reason": str(error)})
        await asyncio.sleep(RESCAN_S)
        yield
