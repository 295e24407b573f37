"""`make fuzz`: at least a million inputs for all targets, or for as long as wanted.

`python -m tests.fuzz --seed 7` prints what became of them. The exit status is 1 if an input is a
fault. It is kept in --keep; `--again FILE` feeds it once more. Put it into tests/fuzz/crashes/ to
make it a test.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.runner import Result, fed, run, split

DEFAULT_INPUTS = 1_000_000


def again(path: Path) -> int:
    """Feeds a kept input. Its folder has the name of the target."""
    with TARGETS[path.resolve().parent.name].feed() as feed:
        print("accepted" if fed(feed, path.read_bytes()) else "refused")
    return 0


def show(result: Result) -> None:
    accepted = result.accepted / max(1, result.inputs)
    print(
        f"{result.target:20} {result.inputs:9,} inputs  {accepted:4.0%} accepted  "
        f"{result.inputs / max(result.seconds, 1e-3):8,.0f}/s  {len(result.faults)} faults",
        flush=True,
    )
    for path, fault in result.faults:
        print(f"  {path}", *traceback.format_exception(fault), sep="\n  ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=DEFAULT_INPUTS, help="for all targets")
    parser.add_argument("--seconds", type=float, default=0, help="for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--only", default="", help="targets whose name has this text")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="folder for faults")
    parser.add_argument("--again", type=Path, help="feed this file once more")
    options = parser.parse_args()
    if options.again:
        return again(options.again)
    logging.disable()  # of the parts that are fuzzed in this process
    print(f"seed {options.seed}", flush=True)
    targets = [one for one in TARGETS.values() if options.only in one.name]
    shares = split(targets, options.inputs)
    results = []
    for one in targets:
        seconds = options.seconds or float("inf")
        results.append(run(one, options.seed, shares[one.name], options.keep, seconds))
        show(results[-1])
    print(f"{sum(one.inputs for one in results):,} inputs, seed {options.seed}")
    return 1 if any(one.faults for one in results) else 0


if __name__ == "__main__":
    sys.exit(main())
