"""Tells subscribers that a model has started or stopped answering requests."""

from __future__ import annotations

from collections.abc import Callable


class ChangeNotifier:
    """List of callbacks that run after every change. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Calls `callback` after every change from now on."""
        self._callbacks.append(callback)

    def notify(self) -> None:
        for callback in self._callbacks:
            callback()
