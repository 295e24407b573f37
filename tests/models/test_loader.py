"""The best engine that works on this machine is loaded, and skipped engines have a reason."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_repo.pipeline import BuildOptions, build
from server.api.stubs import classify_pb2 as pb
from server.engines.base import Instance
from server.engines.record import preference
from server.engines.tensorrt import backend as tensorrt
from server.errors import CannotServe
from server.models import profile_cache
from server.models.loader import EngineLoader, LoadedEngine
from server.repository import reader
from server.repository.contents import list_versions
from server.repository.manifest import MANIFEST_FILE, ONNX_FILE, EngineRecord, InvalidVersion
from tests.support.serving import serve

UNTRAINED = "random:0"
NO_DRIVER = "this machine has no NVIDIA driver; install it to use a GPU"

pytestmark = pytest.mark.skipif(
    tensorrt.hardware() != "none", reason="promises of a machine without a GPU"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lenet5 in two repositories: `both` has OpenVINO and TensorRT engines, `gpu` TensorRT only."""
    root = tmp_path_factory.mktemp("published")
    for name, backends in (("both", "openvino,tensorrt"), ("gpu", "tensorrt")):
        build("lenet5", BuildOptions(repo=root / name, backend=backends, weights=UNTRAINED))
    return root


def loaded(repo: Path, **options: Any) -> LoadedEngine:
    return load_with(EngineLoader(threads=1, **options), repo)


def load_with(loader: EngineLoader, repo: Path) -> LoadedEngine:
    (version,) = list_versions(repo)
    return loader.load(version)


def refused(repo: Path, **options: Any) -> str:
    with pytest.raises(InvalidVersion) as caught:
        loaded(repo, **options).engine.close()
    return str(caught.value)


def test_gpu_engines_come_first_then_the_faster_precision() -> None:
    kinds = [("null", "fp32"), ("openvino", "fp32"), ("tensorrt", "fp32"), ("abacus", "fp16")]
    kinds += [("inductor cpu", "fp16"), ("inductor cuda", "bf16")]
    kinds += [("tensorrt", "fp16"), ("openvino", "bf16"), ("tensorrt", "bf16")]
    records = [
        EngineRecord(
            name=f"{backend}-{precision}",
            backend=backend.partition(" ")[0],
            backend_version="1",
            precision=precision,
            hardware=backend.partition(" ")[2],
            max_batch=1,
            files=(),
            deviation={},
        )
        for backend, precision in kinds
    ]
    assert [record.name for record in sorted(records, key=preference)] == [
        *("tensorrt-fp16", "tensorrt-bf16", "tensorrt-fp32"),
        *("inductor cuda-bf16", "openvino-bf16", "openvino-fp32", "inductor cpu-fp16"),
        *("null-fp32", "abacus-fp16"),
    ]


async def test_without_a_gpu_the_cpu_engine_serves_with_the_reason(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with serve(published / "both") as served:
        (model,) = (await served.call("ListModels", pb.ListModelsRequest())).models
        zeros = np.zeros((32, 32, 1), np.uint8).tobytes()
        image = pb.Image(raw=pb.RawImage(height=32, width=32, channels=1, data=zeros))
        answer = await served.classify(pb.ClassifyRequest(model="lenet5", images=[image]))
        metrics = served.server.metrics.render().decode()
    assert len(answer.results) == 1
    assert (model.state, model.backend) == (pb.Model.READY, "openvino")
    manifest = list_versions(published / "both")[0].manifest
    assert manifest is not None
    assert model.reason == f"{manifest.engines[1].name}: {NO_DRIVER}"
    assert 'engine_fallback{backend="openvino",model="lenet5",version="1"} 1.0' in metrics
    (warning,) = (record for record in caplog.records if record.msg == "engine_skipped")
    assert vars(warning)["reason"] == NO_DRIVER


async def test_an_engine_of_the_only_backend_allowed_is_no_fallback(published: Path) -> None:
    async with serve(published / "both", backend="openvino") as served:
        (model,) = (await served.call("ListModels", pb.ListModelsRequest())).models
        metrics = served.server.metrics.render().decode()
    assert (model.state, model.reason) == (pb.Model.READY, "")
    assert 'engine_fallback{backend="openvino",model="lenet5",version="1"} 0.0' in metrics


async def test_without_a_working_engine_the_server_ends_with_the_reason(published: Path) -> None:
    with pytest.raises(CannotServe, match=NO_DRIVER):
        async with serve(published / "gpu", wait=False) as served:
            await served.server.hurry.wait()


def test_rebuild_compiles_an_engine_from_the_graph_and_publishes_it(
    published: Path, tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(published / "gpu", repo)
    assert NO_DRIVER in refused(repo)
    first = loaded(repo, rebuild=True)
    first.engine.close()
    assert first.record.backend == "openvino"
    assert first.record.deviation, "the golden check has run"
    (version,) = list_versions(repo)
    assert version.manifest is not None
    assert [engine.backend for engine in version.manifest.engines] == ["tensorrt", "openvino"]
    reader.verify_files(version.folder, version.manifest)
    again = loaded(repo)
    again.engine.close()
    assert again.record == first.record
    assert NO_DRIVER in again.skipped_engines


def test_a_failed_rebuild_has_a_reason_and_changes_nothing(published: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(published / "gpu", repo)
    onnx = repo / "lenet5" / "1" / ONNX_FILE
    damaged = bytearray(onnx.read_bytes())
    damaged[1000] ^= 1
    onnx.write_bytes(damaged)
    before = (repo / "lenet5" / "1" / MANIFEST_FILE).read_bytes()
    why = refused(repo, rebuild=True)
    assert "rebuilt tensorrt engine: this machine has no hardware for tensorrt" in why
    assert "rebuilt openvino engine: model.onnx is not what was published" in why
    assert (repo / "lenet5" / "1" / MANIFEST_FILE).read_bytes() == before
    assert "this server uses only tensorrt engines" in refused(
        repo, rebuild=True, only_backend="tensorrt"
    )


def test_the_same_network_with_other_weights_is_not_profiled_again(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = EngineLoader(threads=1, only_backend="openvino")
    timed: list[float] = []

    def measure(instance: Instance, rows: int) -> float:
        timed.append(float(len(timed) + 1))
        return timed[-1]

    monkeypatch.setattr(profile_cache, "_measure", measure)
    first = load_with(loader, published / "both")
    first.engine.close()
    sizes = len(timed)
    assert sizes > 1
    assert first.groups[0].profile(1) == 1
    repo = tmp_path / "repo"
    build("lenet5", BuildOptions(repo=repo, backend="openvino", weights="random:1"))
    second = load_with(loader, repo)
    second.engine.close()
    assert len(timed) == sizes
    assert second.groups == first.groups
    build(
        "lenet5",
        BuildOptions(
            repo=tmp_path / "fp32", backend="openvino", precision="fp32", weights=UNTRAINED
        ),
    )
    other = load_with(loader, tmp_path / "fp32")
    other.engine.close()
    assert (len(timed) > sizes) == (other.record.precision != first.record.precision)
