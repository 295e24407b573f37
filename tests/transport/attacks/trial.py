"""One attack on one server, with a victim: what it cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.transport.attacks.attack import Attack
from tests.transport.attacks.processes import Attacker, ServerProcess
from tests.transport.attacks.victim import CALLS, Experience, Victim

MAX_ANSWER_S = 0.25  # for the victim's call, whatever the attackers do
MAX_RECOVERY_S = 1.0  # for its first calls after the attack
MAX_LOG_LINES_PER_S = 3
LOAD = Path("/proc/loadavg")
OVERLOADED = "classify 8"  # RESOURCE_EXHAUSTED


@dataclass
class Outcome:
    """What an attack did to a server and to its victim."""

    during: Experience
    after: Experience  # the first calls once the attack is over
    seconds: float
    cpu_s: float
    growth_bytes: int
    log_lines: int
    effort: dict[str, int]
    contention: float  # processes that want to run, for each core; at least 1

    @property
    def longest_s(self) -> float:
        return self.during.longest_s(*CALLS)

    @property
    def noise_s(self) -> float:
        """The longest that a process without work was kept waiting by this machine."""
        return self.during.longest_s("echo")

    def problems(self, one: Attack) -> list[str]:
        """What the server must not let happen, in words. Empty if it stood the attack.

        Time limits grow with what else runs on the machine.
        """
        limit_s = MAX_ANSWER_S * self.contention + 4 * self.noise_s
        recovery_s = self.after.longest_s(*CALLS)
        failures = self.during.statuses | self.after.statuses
        if one.is_overload:
            failures.pop(OVERLOADED, None)
        checks = {
            f"a call took {self.longest_s:.3f} s; limit {limit_s:.3f} s": self.longest_s > limit_s,
            f"the first call afterwards took {recovery_s:.3f} s": recovery_s
            > MAX_RECOVERY_S * self.contention,
            f"memory grew by {self.growth_bytes >> 20} MB": self.growth_bytes
            > one.max_growth_bytes,
            f"{self.log_lines} log lines in {self.seconds:.1f} s": self.log_lines
            > MAX_LOG_LINES_PER_S * (1 + self.seconds),
            f"calls failed: {failures}": bool(failures),
            "the attacker sent nothing": not self.effort["connections"],
        }
        return [text for text, is_bad in checks.items() if is_bad]


class Contention:
    """How many processes want to run for each core, on average."""

    def __init__(self) -> None:
        self._samples: list[float] = []

    def while_alive(self, is_alive: Callable[[], bool]) -> Callable[[], bool]:
        """The same condition, which also looks at the load each time."""

        def goes_on() -> bool:
            self._samples.append(int(LOAD.read_text().split()[3].partition("/")[0]))
            return is_alive()

        return goes_on

    def factor(self) -> float:
        average = sum(self._samples) / len(self._samples)
        return max(1.0, average / len(os.sched_getaffinity(0)))


def attack(
    server: ServerProcess, attacker: Attacker, echo_port: int, one: Attack, seconds: float
) -> Outcome:
    """Runs an attack of `seconds` with a victim beside it."""
    port = server.http_port if one.port == "http" else server.port
    assert port is not None
    victim = Victim(server.port, server.http_port, echo_port, server.tls)
    try:
        victim.call_once(Experience())
        server.reset_peak()
        resident_bytes, cpu_s, lines = server.resident_bytes(), server.cpu_s(), server.log_lines()
        began_s = time.monotonic()
        attacking = attacker.start(one.name, port, seconds)
        contention = Contention()
        during = victim.live_while(contention.while_alive(attacking.is_alive))
        took_s = time.monotonic() - began_s
        after = Experience()
        victim.call_once(after)
        return Outcome(
            during,
            after,
            took_s,
            server.cpu_s() - cpu_s,
            server.peak_bytes() - resident_bytes,
            server.log_lines() - lines,
            attacker.effort,
            contention.factor(),
        )
    finally:
        victim.close()
