"""A load runs at idle priority, and the threads it created serve at normal priority."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from server.process.idle_priority import is_reversible

ROOT = Path(__file__).resolve().parent.parent.parent

POLICIES = """
import os, threading
from server.process.idle_priority import idle_priority

def policy(): return os.sched_getscheduler(threading.get_native_id())

go_on, policies, threads = threading.Event(), [], []
def created():
    policies.append(policy()); go_on.wait(); policies.append(policy())
def load():
    with idle_priority(own_limit_s=1000):
        policies.append(policy())
        threads.append(threading.Thread(target=created)); threads[0].start()
        while len(policies) < 2: pass
    policies.append(policy())
thread = threading.Thread(target=load); thread.start(); thread.join()
go_on.set(); threads[0].join()
with idle_priority(own_limit_s=0):
    while policy() != os.SCHED_OTHER: pass
print(*policies, policy())
"""


def test_a_load_and_its_threads_have_idle_priority_until_it_ends() -> None:
    command = [sys.executable, "-c", POLICIES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    during = os.SCHED_IDLE if is_reversible() else os.SCHED_OTHER
    # the loading thread and its child during the load, both afterwards, and after the time limit
    assert done.stdout.split() == [str(policy) for policy in (during, during, 0, 0, 0)]
