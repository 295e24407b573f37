"""A bare engine in a process of its own, which measures on request.

The parent process starts `python -m tests.benchmarks.targets.bare_process --repo REPO --model NAME`
and exchanges lines of JSON with it: first the description of the engine, then one result for each
request to measure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.engines.base import instances_by_units
from server.models.loader import EngineLoader
from server.process.cores import available_cores
from tests.benchmarks.targets.bare import keep_busy, newest_version

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ROWS = (1, 2, 4, 8, 16, 32, 64)  # batch sizes to try, up to the engine's maximum


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to use the bare engine: batches of `rows` on all instances of one group."""

    units: int  # cores of one instance
    instances: int
    rows: int

    def __str__(self) -> str:
        cores = "1 core" if self.units == 1 else f"{self.units} cores"
        return f"{self.instances} x {cores}, batch {self.rows}"


class BareEngine:
    """Handle of the process. The engine is idle between measurements."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        description = self._read()
        self.engine: str = description["engine"]
        self.trained: bool = description["trained"]
        self.max_batch: int = description["max_batch"]
        groups = description["groups"]
        self.setups = [
            Setup(group["units"], group["instances"], rows)
            for group in groups
            for rows in ROWS
            if rows <= self.max_batch
        ]
        self.single_setups = [Setup(group["units"], 1, 1) for group in groups]

    def measure(self, setup: Setup, seconds: float) -> tuple[float, float]:
        """Returns images/s and the median seconds per batch."""
        request = asdict(setup) | {"seconds": seconds}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        result = self._read()
        return result["rows_hz"], result["batch_s"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: the bare engine ended with status {self._process.wait()}")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def bare_engine(repo: Path, model: str) -> Iterator[BareEngine]:
    command = [sys.executable, "-m", "tests.benchmarks.targets.bare_process"]
    with subprocess.Popen(
        [*command, "--repo", str(repo), "--model", model],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield BareEngine(process)
        finally:
            process.kill()


def main() -> None:
    """Loads the engine, then measures once for each line of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    version = newest_version(args.repo, args.model)
    loaded = EngineLoader(threads=available_cores()).load(version)
    groups = {group[0].units: group for group in instances_by_units(loaded.engine)}
    assert version.manifest is not None
    description = {
        "engine": loaded.record.name,
        "trained": version.manifest.weights.trained,
        "groups": [{"units": units, "instances": len(group)} for units, group in groups.items()],
        "max_batch": loaded.engine.max_batch,
    }
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        group = groups[request["units"]][: request["instances"]]
        rows_hz, batch_s = keep_busy(group, request["rows"], request["seconds"])
        print(json.dumps({"rows_hz": rows_hz, "batch_s": batch_s}), flush=True)


if __name__ == "__main__":
    main()
