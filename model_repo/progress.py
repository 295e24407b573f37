"""Reports the progress of a build, and shows it on the console."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LONG_STAGE_S = 1.0
STAGES = ("card", "weights", "reference", "export", "compile", "check", "evaluate", "publish")


class BuildProgress:
    """Receives the progress of a build. This base class ignores it."""

    def stage(self, name: str) -> None:
        """The next of STAGES starts."""

    def advance(self, done: int, total: int | None) -> None:
        """Progress within the stage, in bytes or steps. `total` is None if it is unknown."""

    def tell(self, text: str) -> None:
        """Something that the user may want to know."""

    def warn(self, text: str) -> None:
        """The build continues, but the user must know this."""


class ConsoleProgress(BuildProgress):
    """Prints a line for each stage that was long or failed. A terminal also gets a bar."""

    def __init__(self, console: Console, models: int, *, live: bool) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.fields[model]:<14}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not live,
        )
        self._total: TaskID = self._bars.add_task("models", total=models, model="all")
        self._task = self._total
        self._model = ""
        self._stage = ""
        self._started_s = 0.0

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start_model(self, model: str) -> None:
        """Starts a new bar."""
        self._model, self._stage = model, ""
        self._task = self._bars.add_task("", total=len(STAGES), model=model)

    def stage(self, name: str) -> None:
        self._print_stage()
        self._stage, self._started_s = name, time.perf_counter()
        self._bars.update(self._task, completed=STAGES.index(name), description=name)

    def advance(self, done: int, total: int | None) -> None:
        fraction = done / total if total else 0
        amount = f"{fraction:.0%}" if total else f"{done / 1e6:.0f} MB"
        self._bars.update(
            self._task,
            completed=STAGES.index(self._stage) + fraction,
            description=f"{self._stage} {amount}",
        )

    def tell(self, text: str) -> None:
        self._console.print(f"{self._model}: {text}", soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"{self._model}: {text}", style="bold yellow", soft_wrap=True)

    def print_traceback(self) -> None:
        """Prints the exception that is being handled."""
        self._console.print_exception()

    def finish_model(self, *, failed: bool) -> None:
        """Prints the last stage and removes the model's bar."""
        self._print_stage("  failed" if failed else "")
        self._bars.remove_task(self._task)
        self._bars.advance(self._total)

    def _print_stage(self, suffix: str = "") -> None:
        seconds = time.perf_counter() - self._started_s
        if self._stage and (suffix or seconds >= LONG_STAGE_S):
            line = f"{self._model:<14} {self._stage:<9} {seconds:7.1f} s{suffix}"
            self._console.print(line, soft_wrap=True)
