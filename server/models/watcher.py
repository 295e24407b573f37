"""Watches the repository and updates the registry when it changes, or when a client asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from watchfiles import Change, awatch

from server.errors import ModelNotReady
from server.models.registry import ModelRegistry
from server.repository.contents import IgnoredEntry, RepositoryContents, list_contents
from server.repository.manifest import MODEL_NAME
from server.telemetry.clock import clock

log = logging.getLogger(__name__)

RESCAN_S = 10.0  # network file systems send no notifications, so the repository is read regularly
WATCH_TIMEOUT_S = 0.5  # changes from before the watch began are seen after the first timeout
STEP_MS = 100  # changes within this time are one change
DEBOUNCE_MS = 500

UNREADABLE = "repository_unreadable"
KUBERNETES_LINK = "..data"
MAX_FAILURES = 100  # that are remembered


class RepositoryWatcher:
    """Keeps the registry in line with a repository.

    Files are read on the `file_thread`. `is_served` tells which models this server may serve
    without a client's request. Links in the repository may lead into `allowed_roots`.
    """

    def __init__(
        self,
        root: Path,
        registry: ModelRegistry,
        file_thread: Executor,
        is_served: Callable[[str], bool],
        allowed_roots: Sequence[Path] = (),
    ) -> None:
        self._root = root
        self._registry = registry
        self._file_thread = file_thread
        self._is_served = is_served
        self._allowed_roots = allowed_roots
        self._failures: set[str] = set()  # that were logged
        self._ignored: set[IgnoredEntry] = set()  # that were logged and are still there
        self._pending: dict[str, object] = {}  # the latest load request of each model, not begun
        self._tasks: set[asyncio.Task[None]] = set()  # load and unload requests in progress

    async def watch(self) -> None:
        """Syncs the registry after every change of the repository. Runs until it is cancelled."""
        async for _ in changes(self._root, self._on_watch_failed):
            found = await self._read()
            if found is not None:
                versions = [version for version in found.versions if self._is_served(version.model)]
                await self._registry.sync(versions, found.configs)

    async def load(self, model: str) -> None:
        """Loads a model as the repository holds it now. Goes on if the client disconnects.

        Raises as `ModelRegistry.load` does.
        """
        request = self._pending[model] = object()
        await self._finish(self._load(model, request))

    async def unload(self, model: str) -> None:
        """Unloads a model. Goes on if the client disconnects.

        Raises as `ModelRegistry.unload` does.
        """
        self._pending.pop(model, None)
        await self._finish(self._registry.unload(model))

    def stop(self) -> None:
        """Cancels the clients' load and unload requests in progress."""
        for task in self._tasks:
            task.cancel()

    async def _load(self, model: str, request: object) -> None:
        found = await self._read() if MODEL_NAME.fullmatch(model) else None
        if model not in self._pending:
            raise ModelNotReady(f"an unload of model {model!r} came before its load had begun")
        if self._pending[model] is request:
            del self._pending[model]
        versions = found.versions if found is not None else []
        config = found.configs.get(model) if found is not None else None
        own = [version for version in versions if version.model == model]
        await self._registry.load(model, own, config)

    async def _finish(self, change: Coroutine[None, None, None]) -> None:
        """Runs a change to its end. A change that is cut off would leave versions half loaded."""
        task = asyncio.ensure_future(change)
        self._tasks.add(task)
        task.add_done_callback(self._on_finished)
        await asyncio.shield(task)

    def _on_finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The client gets the error too, if it is still connected.
            log.debug("load_request_failed", extra={"reason": str(error)})

    async def _read(self) -> RepositoryContents | None:
        """The repository's content; None if it can't be read, so that nothing changes."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._file_thread, partial(list_contents, self._root, self._allowed_roots)
            )
        except OSError as error:
            self._fail(UNREADABLE, str(error.strerror or error))
            return None
        except Exception as error:  # our own bug; the loaded models keep serving
            reason = f"{type(error).__name__}: {error}"
            self._fail(UNREADABLE, reason, error)
            return None
        self._failures = {one for one in self._failures if not one.startswith(UNREADABLE)}
        for path, reason in set(found.ignored) - self._ignored:
            log.warning("entry_ignored", extra={"path": str(path), "reason": reason})
        self._ignored = set(found.ignored)
        return found

    def _on_watch_failed(self, reason: str) -> None:
        self._fail("watch_fell_back_to_polling", reason)

    def _fail(self, event: str, reason: str, error: Exception | None = None) -> None:
        """Logs a failure, unless it was logged for the same reason before."""
        failure = f"{event} {reason}"
        if failure in self._failures:
            return
        if len(self._failures) >= MAX_FAILURES:  # a reason may hold the name of a file
            self._failures.clear()
        self._failures.add(failure)
        log.warning(event, extra={"path": str(self._root), "reason": reason}, exc_info=error)


async def changes(root: Path, on_failure: Callable[[str], None]) -> AsyncIterator[None]:
    """Yields at once, soon after each change below `root`, and at least every RESCAN_S.

    Without notifications it polls. `on_failure` gets the reason each time they fail.
    """
    yield

    def is_visible(change: Change, path: str) -> bool:
        return _is_visible(root, path)

    due_s = 0.0
    while True:
        try:
            async for changed in awatch(
                root,
                watch_filter=is_visible,
                step=STEP_MS,
                debounce=DEBOUNCE_MS,
                rust_timeout=round(WATCH_TIMEOUT_S * 1e3),
                yield_on_timeout=True,
            ):
                if changed or clock() >= due_s:
                    yield
                    due_s = clock() + RESCAN_S
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        # Too many watches, a name that is not UTF-8, the folder is missing, ... A panic in the
        # library's Rust code is not even an Exception.
        except BaseException as error:
            on_failure(_reason(error))
        await asyncio.sleep(RESCAN_S)
        yield


def _is_visible(root: Path, path: str) -> bool:
    """Whether a change may concern readers. Writers have not finished hidden files.

    Kubernetes updates a mounted ConfigMap by replacing the link `..data`.
    """
    try:
        parts = Path(path).relative_to(root).parts
    except ValueError:
        return True
    return KUBERNETES_LINK in parts or not any(part.startswith(".") for part in parts)


def _reason(error: BaseException) -> str:
    """The cause; the library raises it as the only member of a group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return str(error) or type(error).__name__
