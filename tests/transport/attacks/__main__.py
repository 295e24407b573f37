"""`make attack`: every attack in its long form, beside grpcio's server, and a page of the results.

`python -m tests.transport.attacks --repo REPO` writes docs/benchmarks/attacks.md. The exit status
is 1 if the server let something happen that it must not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.transport.attacks.catalogue import ATTACKS
from tests.transport.attacks.page import BESIDE, page, row
from tests.transport.attacks.processes import (
    ROOT,
    attacker,
    convserve,
    echo,
    grpcio_server,
)
from tests.transport.attacks.trial import Outcome, attack

PAGE = ROOT / "docs/benchmarks/attacks.md"


def run(repo: Path, names: list[str], seconds: float) -> dict[str, dict[str, Outcome]]:
    """Outcomes by attack and server. Both servers run at the same time; one is attacked."""
    outcomes: dict[str, dict[str, Outcome]] = {}
    with attacker() as attackers, echo() as echo_port:
        for name in names:
            one, outcomes[name] = ATTACKS[name], {}
            with convserve(repo, "--models=lenet5", tls=one.tls) as server:
                outcomes[name]["convserve"] = attack(server, attackers, echo_port, one, seconds)
            if one.port == "grpc" and not one.tls:
                with grpcio_server() as other:
                    outcomes[name][BESIDE] = attack(other, attackers, echo_port, one, seconds)
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
