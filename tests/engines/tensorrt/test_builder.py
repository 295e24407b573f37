"""How a plan is built: precision, the parser's errors, and the timing cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from server.engines.base import CompileOptions
from server.engines.tensorrt import backend
from server.engines.tensorrt.builder import TimingCache
from server.engines.tensorrt.cuda import Gpu
from server.engines.tensorrt.libraries import import_library
from server.errors import EngineFailure
from server.repository.manifest import ONNX_FILE
from tests.support.fakes.fake_tensorrt import (
    FakeTensorRt,
)

GPU = Gpu(name="Ada", capability="sm89", driver_cuda=13000, required_cuda=13000, free_bytes=8 << 30)


def test_tf32_is_off_and_tensorrt_allocates_no_memory_itself(
    built_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt: Any = import_library("rtx")
    configs: list[Any] = []

    class Builder(trt.Builder):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            configs.append(super().create_builder_config())
            return configs[-1]

    monkeypatch.setattr(trt, "Builder", Builder)
    graph = built_repository / "lenet5" / "1" / ONNX_FILE
    backend.compile(graph, tmp_path, CompileOptions("fp32", 4))
    (config,) = configs
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_an_unsupported_layer_is_named_with_what_to_change(
    built_repository: Path, tmp_path: Path
) -> None:
    model = onnx.load(built_repository / "lenet5" / "1" / ONNX_FILE)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.op_type, node.domain = "ConvOfTomorrow", "tomorrow"
    onnx.save_model(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineFailure, match=r"odd\.onnx") as caught:
        backend.compile(tmp_path / "odd.onnx", tmp_path, CompileOptions("fp32", 4))
    assert node.name in str(caught.value)
    assert "ConvOfTomorrow" in str(caught.value)
    assert "Change that layer" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no network"])
def test_a_file_that_is_not_a_graph_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    for precision in ("fp32", "fp16"):
        with pytest.raises(EngineFailure, match=r"bad\.onnx is not a usable ONNX graph"):
            backend.compile(tmp_path / "bad.onnx", tmp_path, CompileOptions(precision, 1))


class FakeBuilderConfig:
    """A builder configuration that rejects a damaged timing cache in one of two calls."""

    def __init__(self, *, rejects_in: str) -> None:
        self.rejects_in = rejects_in
        self.used: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" and self.rejects_in == "create" else content

    def set_timing_cache(self, content: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if content == b"damaged":
            return False
        self.used = content
        return True

    def get_timing_cache(self) -> FakeBuilderConfig:
        return self

    def serialize(self) -> bytes:
        return (self.used or b"") + b"more"


@pytest.mark.parametrize("rejects_in", ["create", "set"])
def test_timings_are_kept_and_a_damaged_cache_is_replaced(rejects_in: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    found: list[bytes | None] = []
    for damage in (False, False, True, False):
        config = FakeBuilderConfig(rejects_in=rejects_in)
        if damage:
            next(folder.iterdir()).write_bytes(b"damaged")
        with TimingCache(FakeTensorRt, config, "tensorrt", GPU, folder):
            found.append(config.used)
    assert found == [b"", b"more", b"", b"more"]
    assert [path.name for path in folder.iterdir()] == ["tensorrt-1-sm89.timing"]
