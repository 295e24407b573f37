"""`make attack`: every attack in its long form, beside grpcio's server, and a page of the results.

`python -m tests.transport.attacks --repo REPO` writes docs/benchmarks/attacks.md. The exit status
is 1 if the server let something happen that it must not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from tests.transport.attacks.attack import MAX_GROWTH_BYTES
from tests.transport.attacks.catalogue import ATTACKS
from tests.transport.attacks.page import BESIDE, page, row
from tests.transport.attacks.processes import (
    ROOT,
    ServerProcess,
    attacker,
    convserve,
    echo,
    grpcio_server,
)
from tests.transport.attacks.trial import MAX_RECOVERY_S, Outcome, attack
from tests.transport.attacks.victim import CALLS

PAGE = ROOT / "docs/benchmarks/attacks.md"


class Kept:
    """A server that is kept from one attack to the next, until one has worn it out."""

    def __init__(self, start: Callable[[], AbstractContextManager[ServerProcess]]) -> None:
        self._start = start
        self._stack = ExitStack()
        self._running: ServerProcess | None = None

    def running(self) -> ServerProcess:
        if self._running is None:
            self._running = self._stack.enter_context(self._start())
        return self._running

    def attacked(self, outcome: Outcome) -> None:
        is_slow = outcome.after.longest_s(*CALLS) > MAX_RECOVERY_S
        if is_slow or outcome.growth_bytes > MAX_GROWTH_BYTES:
            self.close()

    def close(self) -> None:
        self._running = None
        self._stack.close()


def run(repo: Path, names: list[str], seconds: float) -> dict[str, dict[str, Outcome]]:
    """Outcomes by attack and server."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    plain = Kept(lambda: convserve(repo, "--models=lenet5"))
    encrypted = Kept(lambda: convserve(repo, "--models=lenet5", tls=True))
    beside = Kept(grpcio_server)
    with attacker() as attackers, echo() as echo_port, ExitStack() as stack:
        for kept in (plain, encrypted, beside):
            stack.callback(kept.close)
        for name in names:
            one = ATTACKS[name]
            servers = {"convserve": encrypted if one.tls else plain}
            if one.port == "grpc" and not one.tls:
                servers[BESIDE] = beside
            outcomes[name] = {}
            for server, kept in servers.items():
                outcome = attack(kept.running(), attackers, echo_port, one, seconds)
                outcomes[name][server] = outcome
                kept.attacked(outcome)
            report(name, outcomes[name])
    return outcomes


def report(name: str, outcomes: dict[str, Outcome]) -> None:
    cells = [f"{server}: {', '.join(row(outcome))}" for server, outcome in outcomes.items()]
    print(name, *cells, *outcomes["convserve"].problems(ATTACKS[name]), sep="\n    ", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", type=Path, required=True, help="a repository with lenet5")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one attack")
    parser.add_argument("--only", default="", help="attacks whose name has this text; no page")
    options = parser.parse_args()
    names = [name for name in ATTACKS if options.only in name]
    outcomes = run(options.repo, names, options.seconds)
    problems = {
        name: found
        for name, servers in outcomes.items()
        if (found := servers["convserve"].problems(ATTACKS[name]))
    }
    if not options.only:
        PAGE.write_text(page(outcomes, options.seconds), encoding="utf-8")
    for name, found in problems.items():
        print(f"{name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
