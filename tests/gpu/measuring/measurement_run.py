"""One run of measurements: its time limit, its steps, and its results on disk."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.gpu.measuring.machine import describe_machine
from tests.gpu.measuring.report import Results, report


class MeasurementRun:
    """Runs steps until the time is up, and writes results.json and results.md after each.

    If the process crashes in a step, the next process can continue after it (`--resume`).
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.scratch: Path = options.scratch
        self.repo: Path = self.scratch / "engines"
        self.seconds: float = options.seconds
        self.peak_flops: float = options.peak_tflops * 1e12
        self.backend: str = options.backend
        self._ends_s = time.monotonic() + 60 * options.minutes
        self.results: Results = {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": options.command,
            "machine": describe_machine(),
            "tried": json.loads(options.tried),
            "backend": options.backend,
            "first_model": "",
            "models": {},
            "skipped": [],
            "failed": [],
        }
        previous = self._previous_results() if options.resume else {}
        if previous.get("backend") != self.backend:
            shutil.rmtree(self.repo, ignore_errors=True)  # it holds another backend's engines
        if previous:
            self.results |= previous | {"backend": self.backend}
            if (running := self.results.pop("running", None)) is not None:
                reason = "the process ended during this step"
                self.results["failed"].append({"step": running, "reason": reason})

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns the result of `work`, or None if it failed or was skipped.

        A step is skipped if the time is up, or if it failed in an earlier process.
        """
        if self._has_failed(name) or self.skip_if_late(name):
            self.save()
            return None
        self.results["running"] = name  # tells the next process where this one crashed
        self.save()
        found = None
        began_s = time.monotonic()
        print(f"{name}: ", end="", flush=True)  # before the work, in case it crashes
        try:
            gc.collect()
            torch.cuda.empty_cache()  # so that TensorRT can allocate this memory
            found = work()
        except (Exception, SystemExit) as error:  # later steps do not depend on this one
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            self.results["failed"].append({"step": name, "reason": reason})
        print(f"{time.monotonic() - began_s:.1f} s", flush=True)
        del self.results["running"]
        return found

    def result_step(self, key: str, name: str, work: Callable[[], Any]) -> None:
        """Runs a step and stores its result under `key`, unless there is one already."""
        if not self.results.get(key):
            self.results[key] = self.step(name, work)

    def skip_if_late(self, name: str) -> bool:
        """Whether the time is up. If so, lists `name` as skipped."""
        if time.monotonic() <= self._ends_s:
            return False
        self.results["skipped"].append(name)
        return True

    def save(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
        (self.out / "results.md").write_text(report(self.results))

    def _previous_results(self) -> Results:
        """The results of an earlier process that crashed; empty if there are none."""
        try:
            found: Results = json.loads((self.out / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def _has_failed(self, name: str) -> bool:
        return any(failed["step"] == name for failed in self.results["failed"])
