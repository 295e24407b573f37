"""The page with what each attack cost."""

from __future__ import annotations

from statistics import fmean

from tests.benchmarks.reports import provenance
from tests.benchmarks.reports.markdown import table
from tests.transport.attacks.trial import MAX_ANSWER_S, MAX_RECOVERY_S, Outcome
from tests.transport.attacks.victim import CALLS

BESIDE = "grpcio"

INTRODUCTION = """\
What a hostile client costs others. `make attack` writes this page; `make test` runs a short form.

Each attack lasts {seconds:g} s and comes from another process: `tests/transport/attacks/` has them
by name. Meanwhile a victim calls health, Classify (LeNet-5) and `/healthz`, one call at a time, now
and then on a new connection. Server, attackers and victim share the cores of one machine.

- **p99**, **longest**: the victim's calls, in ms. The longest must stay below {answer_ms:.0f} ms,
  times the number of processes that want to run for each core.
- **after**: the victim's longest call right after the attack, in ms; at most {recovery_s:g} s.
- **CPU**: processor time of the server, as a share of one core.
- **memory**: the most that the server's resident memory grew, in MB.
- **grpcio**: grpcio's asyncio server with the same methods and without a model, in the same run."""

HEADINGS = (
    "attack",
    "p99",
    "longest",
    "after",
    "CPU",
    "memory",
    "grpcio: longest",
    "grpcio: CPU",
    "grpcio: memory",
)


def row(outcome: Outcome) -> list[str]:
    """p99 and longest call of the victim, recovery, processor, memory."""
    calls_s = outcome.during.all_s(*CALLS)
    return [
        f"{calls_s[int(len(calls_s) * 0.99)] * 1e3:.0f}",
        f"{outcome.longest_s * 1e3:.0f}",
        f"{outcome.after.longest_s(*CALLS) * 1e3:.0f}",
        f"{outcome.cpu_s / outcome.seconds * 100:.0f} %",
        f"{max(0, outcome.growth_bytes) >> 20}",
    ]


def contention(outcomes: dict[str, dict[str, Outcome]]) -> float:
    return fmean(one.contention for servers in outcomes.values() for one in servers.values())


def page(outcomes: dict[str, dict[str, Outcome]], seconds: float) -> str:
    rows = []
    for name, servers in outcomes.items():
        other = servers.get(BESIDE)
        compared = row(other) if other else ["", "", "", "", ""]
        rows.append([f"`{name}`", *row(servers["convserve"]), compared[1], *compared[3:]])
    return "\n".join(
        (
            "# Attacks",
            "",
            *INTRODUCTION.format(
                seconds=seconds, answer_ms=MAX_ANSWER_S * 1e3, recovery_s=MAX_RECOVERY_S
            ).splitlines(),
            "",
            *(f"{name}: {text}  " for name, text in provenance.machine().items()),
            "{date}, commit {commit}".format(**provenance.date_and_commit()),
            "",
            f"On average {contention(outcomes):.1f} processes wanted to run for each core.",
            "",
            *table(HEADINGS, rows),
            "",
        )
    )
