"""What is free is what the tightest limit leaves, and an engine that needs more is refused."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.models import memory_budget as memory
from server.models.memory_budget import check_memory, free_bytes, needed_bytes
from server.process import allocator
from server.process import idle_priority as priority
from server.repository.manifest import EngineRecord, FileRecord, InvalidVersion

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent.parent


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {
    "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Free: 0\n"
}
V2 = {"proc/self/cgroup": "0::/pods/mine\n"}
V1 = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/pods/mine\n1:name=systemd:/x\n"}


def v2(path: str, limit: str, used: int, cached: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon {used - cached}\ninactive_file {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 8 * GIB),
        (MACHINE | V2 | v2("/pods/mine", "max", GIB, 0), 8 * GIB),
        (MACHINE | V2 | v2("/pods/mine", str(4 * GIB), 2 * GIB, GIB), 3 * GIB),
        (  # a group's limit holds for all in it
            MACHINE
            | V2
            | v2("/pods/mine", str(4 * GIB), GIB, 0)
            | v2("/pods", str(3 * GIB), GIB, 0),
            2 * GIB,
        ),
        # A container sees its own group as the root.
        (MACHINE | {"proc/self/cgroup": "0::/\n"} | v2("", str(GIB), GIB // 2, 0), GIB // 2),
        (MACHINE | V2 | v2("/pods/mine", str(GIB), 2 * GIB, 0), 0),
        (
            MACHINE
            | V1
            | {
                "sys/fs/cgroup/memory/pods/mine/memory.limit_in_bytes": str(GIB),
                "sys/fs/cgroup/memory/pods/mine/memory.usage_in_bytes": str(GIB // 2),
                "sys/fs/cgroup/memory/pods/mine/memory.stat": f"total_inactive_file {GIB // 4}\n",
            },
            GIB * 3 // 4,
        ),
    ],
)
def test_what_is_free_is_what_the_tightest_limit_leaves(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    assert free_bytes(write(tmp_path, files)) == free


LARGE_CALLS = """
import os, resource, sys
from server.process import allocator

if sys.argv[1] == "kept":
    assert allocator.keep_freed({})

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def calls(number):
    for _ in range(number):
        messages = [b"x" * (4 << 20) for _ in range(4)]
        del messages

calls(3)
before = faults()
calls(10)
during = faults() - before
allocator.give_back()
before = faults()
calls(1)
print(during, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's malloc")
def test_what_large_calls_freed_is_there_for_the_next_ones_until_it_is_given_back() -> None:
    """4 messages of 4 MiB at a time, of pages of 4 KiB: so many page faults a call, or none."""
    environment = {name: os.environ[name] for name in os.environ if "MALLOC" not in name}
    found = {}
    for how in ("kept", "usual"):
        command = [sys.executable, "-c", LARGE_CALLS, how]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found[how] = [int(number) for number in done.stdout.split()]
    pages = 4 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert found["usual"][0] > 9 * pages, "or there is nothing to mend any more"
    assert found["kept"][0] < pages / 10
    assert found["kept"][1] > pages / 2, "it was given back"


def test_what_an_operator_says_of_malloc_goes_before() -> None:
    assert not allocator.keep_freed({"MALLOC_TRIM_THRESHOLD_": "65536"})


def test_a_version_is_refused_only_once_what_is_kept_was_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = GIB // 16
    monkeypatch.setattr(memory, "free_bytes", lambda: free)

    def give_back() -> None:
        nonlocal free
        free = GIB

    monkeypatch.setattr(allocator, "give_back", give_back)
    check_memory(engine(100 << 20), (32, 32, 1), 1)
    assert free == GIB, "it was short, and asked for it"


def test_this_machine_says_how_much_is_free() -> None:
    free = free_bytes()
    assert free is not None
    assert free > 0


def engine(
    size: int, max_batch: int = 8, backend: str = "openvino", hardware: str = ""
) -> EngineRecord:
    return EngineRecord(
        name="x",
        backend=backend,
        backend_version="1",
        precision="fp32",
        hardware=hardware,
        max_batch=max_batch,
        files=(FileRecord(name="x", bytes=size, sha256="0" * 64),),
        deviation={},
    )


def test_what_is_needed_grows_with_weights_rows_and_instances() -> None:
    row = (224, 224, 3)
    vgg16 = needed_bytes(engine(276_700_000), row, 2)
    assert 1_164e6 < vgg16 < 1_500e6  # measured: 1,164 MB
    assert needed_bytes(engine(276_700_000), row, 1) < vgg16
    assert needed_bytes(engine(276_700_000, max_batch=16), row, 2) > vgg16
    assert needed_bytes(engine(100, backend="null"), row, 1) < 2_000_000


@pytest.mark.parametrize(
    ("backend", "hardware"), [("tensorrt", "sm80 sm90"), ("inductor", "cuda sm90")]
)
def test_an_engine_on_a_gpu_needs_the_host_for_its_file_and_its_rows(
    backend: str, hardware: str
) -> None:
    vgg16, row = engine(276_700_000, 256, backend, hardware), (224, 224, 3)
    rows_bytes = 2 * 256 * 224 * 224 * 3
    for threads in (1, 16):
        assert 276_700_000 + rows_bytes < needed_bytes(vgg16, row, threads) < 700_000_000
    on_cpu = engine(276_700_000, 256, backend="inductor", hardware="cpu x86_64 AVX512")
    assert needed_bytes(on_cpu, row, 16) > 10e9


def test_an_engine_that_needs_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 100 << 20)
    check_memory(engine(1 << 20), (32, 32, 1), 1)
    with pytest.raises(InvalidVersion, match="about 220 MiB of memory, and 100 MiB are free"):
        check_memory(engine(100 << 20), (32, 32, 1), 1)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)  # nobody says: try
    check_memory(engine(100 << 40), (32, 32, 1), 1)


WAYS = """
import os, threading
from server.process.idle_priority import idle_priority

def way(): return os.sched_getscheduler(threading.get_native_id())

go, told, threads = threading.Event(), [], []
def born():
    told.append(way()); go.wait(); told.append(way())
def loader():
    with idle_priority(own_patience_s=1000):
        told.append(way())
        threads.append(threading.Thread(target=born)); threads[0].start()
        while len(told) < 2: pass
    told.append(way())
thread = threading.Thread(target=loader); thread.start(); thread.join(); go.set(); threads[0].join()
with idle_priority(own_patience_s=0):
    while way() != os.SCHED_OTHER: pass
print(*told, way())
"""


def test_what_loads_gives_way_and_what_it_made_serves_as_usual_afterwards() -> None:
    command = [sys.executable, "-c", WAYS]
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    meanwhile = os.SCHED_IDLE if priority.reversible() else os.SCHED_OTHER
    # the loader and the thread it made; both afterwards; who has lost its patience
    assert done.stdout.split() == [str(way) for way in (meanwhile, meanwhile, 0, 0, 0)]
