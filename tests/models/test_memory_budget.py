"""An engine that needs more memory than is free is not loaded."""

from __future__ import annotations

import pytest

from server.models import memory_budget as memory
from server.models.memory_budget import check_memory, needed_bytes
from server.process import allocator
from server.repository.manifest import EngineRecord, FileRecord, InvalidVersion

GIB = 1 << 30


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


def test_needed_memory_grows_with_weights_rows_and_instances() -> None:
    row = (224, 224, 3)
    vgg16 = needed_bytes(engine(276_700_000), row, 2)
    assert 1_164e6 < vgg16 < 1_500e6  # measured: 1,164 MB
    assert needed_bytes(engine(276_700_000), row, 1) < vgg16
    assert needed_bytes(engine(276_700_000, max_batch=16), row, 2) > vgg16
    assert needed_bytes(engine(100, backend="null"), row, 1) < 2_000_000


@pytest.mark.parametrize(
    ("backend", "hardware"), [("tensorrt", "sm80 sm90"), ("inductor", "cuda sm90")]
)
def test_a_gpu_engine_needs_host_memory_for_its_file_and_its_rows(
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
    with pytest.raises(InvalidVersion, match="about 220 MiB of memory; 100 MiB are free"):
        check_memory(engine(100 << 20), (32, 32, 1), 1)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)  # unknown: try
    check_memory(engine(100 << 40), (32, 32, 1), 1)


def test_kept_memory_is_given_back_before_an_engine_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = GIB // 16
    monkeypatch.setattr(memory, "free_bytes", lambda: free)

    def give_back() -> None:
        nonlocal free
        free = GIB

    monkeypatch.setattr(allocator, "give_back", give_back)
    check_memory(engine(100 << 20), (32, 32, 1), 1)
    assert free == GIB, "memory was short, so it was given back"
