"""A hostile client neither keeps the server from answering another client, nor takes its memory.

The short form of `make attack`. Server, attackers and victim are processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transport.attacks.__main__ import run
from tests.transport.attacks.catalogue import ATTACKS, LONG_FORM_ONLY
from tests.transport.attacks.page import BESIDE, HEADINGS, page
from tests.transport.attacks.processes import Attacker, ServerProcess, attacker, convserve, echo
from tests.transport.attacks.trial import attack

ATTACK_S = 0.3


@pytest.fixture(scope="module")
def server(built_repository: Path) -> Iterator[ServerProcess]:
    with convserve(built_repository, "--models=lenet5") as running:
        yield running


@pytest.fixture(scope="module")
def tls_server(built_repository: Path) -> Iterator[ServerProcess]:
    with convserve(built_repository, "--models=lenet5", tls=True) as running:
        yield running


@pytest.fixture(scope="module")
def attackers() -> Iterator[Attacker]:
    with attacker() as running:
        yield running


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    with echo() as port:
        yield port


SHORT_FORM = [name for name in ATTACKS if name not in LONG_FORM_ONLY]


@pytest.mark.parametrize("name", [name for name in SHORT_FORM if ATTACKS[name].tls])
def test_another_client_is_served_during_a_flood_of_handshakes(
    tls_server: ServerProcess, attackers: Attacker, echo_port: int, name: str
) -> None:
    outcome = attack(tls_server, attackers, echo_port, ATTACKS[name], ATTACK_S)
    assert not outcome.problems(ATTACKS[name])
    assert tls_server.process.poll() is None


@pytest.mark.parametrize("name", [name for name in SHORT_FORM if not ATTACKS[name].tls])
def test_another_client_is_served_during_an_attack(
    server: ServerProcess, attackers: Attacker, echo_port: int, name: str
) -> None:
    outcome = attack(server, attackers, echo_port, ATTACKS[name], ATTACK_S)
    assert not outcome.problems(ATTACKS[name])
    assert server.process.poll() is None


def test_the_long_form_compares_with_grpcio_and_makes_a_page(built_repository: Path) -> None:
    outcomes = run(built_repository, ["ping"], 0.2)
    assert not outcomes["ping"]["convserve"].problems(ATTACKS["ping"])
    assert outcomes["ping"][BESIDE].during.all_s("health", "classify")
    (line,) = (one for one in page(outcomes, 0.2).splitlines() if one.startswith("| `ping`"))
    assert line.count("|") == len(HEADINGS) + 1
