"""Promises of the GPU's engines that need no GPU: every network compiles, the passport's refusals,
and the order of copies, launches and events. What needs one is in tests/gpu/lane.py."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np
import openvino
import pytest

from model_repo import architectures, cards
from model_repo.build import BuildError, Order, build
from model_repo.cards import MAX_BATCH
from model_repo.export import Served, export
from server.engines import golden_check as golden
from server.engines import tensorrt
from server.engines.base import CompileOptions, Outputs, graph_sizes, infer
from server.engines.onnx_precision import convert_precision
from server.engines.tensorrt import cuda
from server.engines.tensorrt.cuda import Absent, Gpu
from server.errors import DeviceLost, EngineFailure
from server.repository import reader
from server.repository.manifest import ONNX_FILE, EngineRecord, FileRecord, Manifest
from tests.support.cuda_recorder import (
    Tape,
    TapedContext,
    TapedLibrary,
    TapedRtx,
)

SHAPE = (2, 3, 1)
CLASSES = 5
WIDTHS = {"classes": 2, "scores": 2, "probabilities": CLASSES}
LAYERS_BYTES = 1000
ADA = Gpu(name="Ada", capability="sm89", cuda=13000, needed=13000, free_bytes=8 << 30)


def exported(name: str, folder: Path, built: Path) -> Path:
    """The graph of a network, of those built or with the parameters that creating it gave it."""
    if (path := built / name / "1" / ONNX_FILE).is_file():
        return path
    card = cards.load(name)
    network = architectures.create(card.architecture, card.classes).eval()
    served = Served(network, classes=card.classes, mean=card.mean, std=card.std)
    path = folder / ONNX_FILE
    export(served, path, shape=card.input.shape, max_batch=MAX_BATCH)
    return path


# --- compiling -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", architectures.architecture_names())
def test_every_network_compiles_to_a_plan_without_a_gpu(
    name: str, built_repository: Path, tmp_path: Path
) -> None:
    onnx = exported(name, tmp_path, built_repository)
    steps: list[tuple[int, int | None]] = []
    target = CompileOptions("fp16", max_batch=64, opt_batch=8)
    compiled = tensorrt.compile(onnx, tmp_path, target, lambda *step: steps.append(step))
    assert compiled.name == f"tensorrt-fp16-sm80-121-rtx{tensorrt.version().split()[1]}"
    assert compiled.hardware == "sm80 sm86 sm89 sm120 sm121"
    assert compiled.version == tensorrt.version()
    (file,) = compiled.files
    graph_bytes = onnx.stat().st_size
    assert (tmp_path / file).stat().st_size > 0.4 * graph_bytes, "the weights are in it, as halves"
    assert steps
    assert all(0 < done <= (of or 0) for done, of in steps)


def test_the_precision_and_the_gpus_are_in_the_name(built_repository: Path, tmp_path: Path) -> None:
    onnx = built_repository / "lenet5" / "1" / ONNX_FILE
    release = f"rtx{tensorrt.version().split()[1]}"
    for asked, precision, name, hardware in (
        (("8.9",), "bf16", f"tensorrt-bf16-sm89-{release}", "sm89"),
        (("sm120", "89"), "fp32", f"tensorrt-fp32-sm89-120-{release}", "sm89 sm120"),
        (("75", "120"), "fp16", f"tensorrt-fp16-sm75-120-{release}", "sm75 sm120"),
    ):
        compiled = tensorrt.compile(
            onnx, tmp_path, CompileOptions(precision, 4, hardware=asked, variant="rtx")
        )
        assert (compiled.name, compiled.hardware) == (name, hardware)
    assert len(list(tmp_path.iterdir())) == 3


def test_float32_means_float32_and_nothing_is_allocated_that_forbids_capturing(
    built_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt: Any = tensorrt._library("rtx")
    configs: list[Any] = []

    class Builder(trt.Builder):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            configs.append(super().create_builder_config())
            return configs[-1]

    monkeypatch.setattr(trt, "Builder", Builder)
    onnx = built_repository / "lenet5" / "1" / ONNX_FILE
    tensorrt.compile(onnx, tmp_path, CompileOptions("fp32", 4))
    (config,) = configs
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (
            CompileOptions("fp16", 4, hardware=("90",)),
            r"no compute capability sm90; it has sm75, sm80",
        ),
        (
            CompileOptions("fp16", 4, variant="tensorrt"),
            r"no TensorRT is installed: pip install 'convserve\[gpu-datacenter\]'",
        ),
    ],
)
def test_what_can_not_be_compiled_for_is_told(
    target: CompileOptions, why: str, built_repository: Path, tmp_path: Path
) -> None:
    onnx = built_repository / "lenet5" / "1" / ONNX_FILE
    with pytest.raises(EngineFailure, match=why):
        tensorrt.compile(onnx, tmp_path, target)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_tensorrt_refuses_is_named_with_what_to_change(
    built_repository: Path, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(built_repository / "lenet5" / "1" / ONNX_FILE)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.op_type, node.domain = "ConvOfTomorrow", "tomorrow"
    onnx.save_model(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineFailure, match=r"odd\.onnx") as caught:
        tensorrt.compile(tmp_path / "odd.onnx", tmp_path, CompileOptions("fp32", 4))
    assert node.name in str(caught.value)
    assert "ConvOfTomorrow" in str(caught.value)
    assert "Change that layer" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no network"])
def test_what_is_no_graph_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    for precision in ("fp32", "fp16"):
        with pytest.raises(EngineFailure, match=r"bad\.onnx is no graph to compile"):
            tensorrt.compile(tmp_path / "bad.onnx", tmp_path, CompileOptions(precision, 1))


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["lenet5", "resnet18", "googlenet"])
def test_a_graph_in_half_precision_gives_the_answers_its_precision_promises(
    name: str, precision: str, built_repository: Path, tmp_path: Path
) -> None:
    """Run by OpenVINO, whose float32 kernels round where the graph says so."""
    folder = built_repository / name / "1"
    manifest = reader.read_manifest(folder)
    truth = reader.read_golden(folder, manifest)
    path = tmp_path / "typed.onnx"
    path.write_bytes(convert_precision(folder / ONNX_FILE, precision))
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", hint).create_infer_request()
    request.infer([truth.pixels])
    answers = request.get_tensor("probabilities").data
    assert answers.dtype == np.float32
    far = golden.deviation(
        truth.probabilities, answers, golden.deviation_scale(truth.probabilities)
    )
    assert 0 < far < golden.MAX_DEVIATION[precision]


@pytest.mark.parametrize("name", ["lenet5", "googlenet2014"])
def test_only_the_body_of_a_graph_is_in_half_precision(
    name: str, built_repository: Path, tmp_path: Path
) -> None:
    import onnx

    path = exported(name, tmp_path, built_repository)
    graph = onnx.load_from_string(convert_precision(path, "fp16")).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert [{types[name] for name in node.input[1:]} for node in layers] == [
        *[{half}] * (len(layers) - 1),
        {single},
    ]
    normalising = [node for node in graph.node if node.op_type in ("Mul", "Add")][:2]
    assert {types[node.input[1]] for node in normalising} == {single}
    wide = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type == "LRN":
            assert node.input[0] in wide, "its sums leave float16's range"


# --- passport --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory, built_repository: Path) -> Path:
    """A repository whose lenet5 has an engine for OpenVINO and one for TensorRT."""
    root = tmp_path_factory.mktemp("added")
    order = Order(repo=root, backend="openvino,tensorrt", weights="random:0")
    build("lenet5", order)
    return root


@pytest.fixture
def record(added: Path) -> EngineRecord:
    return manifest_of(added).engines[1]


def manifest_of(root: Path, version: int = 1) -> Manifest:
    return reader.read_manifest(root / "lenet5" / str(version))


def here(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """From now on this machine has that GPU."""

    class Present:
        def gpu(self) -> Gpu:
            return gpu

    monkeypatch.setattr(tensorrt, "Cuda", Present)


def test_a_plan_lies_beside_the_cpus_engine_with_all_that_is_known_of_it(added: Path) -> None:
    cpu, gpu = manifest_of(added).engines
    assert (cpu.backend, gpu.backend, gpu.precision) == ("openvino", "tensorrt", "fp16")
    assert gpu.backend_version == tensorrt.version()
    card = cards.load("lenet5")
    assert (gpu.min_batch, gpu.opt_batch, gpu.max_batch) == (
        1,
        card.gpu_opt_batch,
        card.gpu_max_batch,
    )
    assert cpu.deviation
    assert not gpu.deviation, "it has not been run"
    reader.verify_files(added / "lenet5" / "1", manifest_of(added))


def test_a_gpu_that_a_plan_was_made_for_takes_it(
    record: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, ADA)
    assert tensorrt.incompatibility(record) is None


def test_every_mismatch_is_a_plain_sentence_before_anything_is_read(
    record: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(gpu: Gpu = ADA, **fields: Any) -> str:
        here(monkeypatch, gpu)
        return tensorrt.incompatibility(msgspec.structs.replace(record, **fields)) or ""

    release = tensorrt.version().split()[1]
    advice = "--add-engine --backend tensorrt"
    old = why(backend_version="rtx 1.2.0")
    assert old.startswith(f"it was compiled by TensorRT-RTX 1.2.0 and this is {release}; ")
    assert old.endswith(advice)
    other = "it needs TensorRT 11.4.0, which is not installed here"
    assert why(backend_version="tensorrt 11.4.0") == other
    assert why(backend_version="abacus 1") == "it was compiled by 'abacus 1', which is unknown here"
    hopper = why(ADA._replace(name="H200", capability="sm90"))
    assert "for sm80, sm86, sm89, sm120, sm121 and this GPU, H200, is sm90" in hopper
    assert hopper.endswith(advice)
    driver = why(ADA._replace(cuda=12040))
    assert driver.startswith("the NVIDIA driver runs CUDA 12.4 and the libraries here need 13.0")
    full = why(ADA._replace(free_bytes=100 << 20))
    assert "512 MiB of the GPU's memory and 100 MiB are free" in full
    assert "precision 'int4' is unknown" in why(precision="int4")


def test_a_library_that_can_not_be_loaded_is_not_installed(
    record: EngineRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NVIDIA's own package ends where its shared libraries are missing."""
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('no libnvinfer.so.11')\n")
    monkeypatch.syspath_prepend(tmp_path)
    here(monkeypatch, ADA)
    plan = msgspec.structs.replace(record, backend_version="tensorrt 11.4.0")
    assert "not installed here" in (tensorrt.incompatibility(plan) or "")
    assert tensorrt.version().startswith("rtx "), "the other variant is taken"


def test_a_machine_without_a_gpu_says_so(added: Path, record: EngineRecord) -> None:
    try:
        cuda.Cuda()
    except Absent:
        assert "no NVIDIA driver" in (tensorrt.incompatibility(record) or "")
        assert tensorrt.hardware() == "none"
        with pytest.raises(EngineFailure, match=r"can't load .*\.plan: this machine has no"):
            tensorrt.load(added / "lenet5" / "1", record, SHAPE, threads=1)
    else:
        pytest.skip("this machine has one")


# --- adding ----------------------------------------------------------------------------------


def test_an_engine_is_added_to_the_newest_version_beside_those_it_has(tmp_path: Path) -> None:
    build("lenet5", Order(repo=tmp_path, weights="random:0", precision="fp32"))
    before = manifest_of(tmp_path)
    order = Order(repo=tmp_path, backend="tensorrt", add=True)
    for capability in ("8.9", "12.0"):
        order = Order(repo=tmp_path, backend="tensorrt", add=True, hardware=(capability,))
        build("lenet5", order)
    after = manifest_of(tmp_path)
    assert after.engines[0] == before.engines[0]
    assert [engine.hardware for engine in after.engines[1:]] == ["sm89", "sm120"]
    assert msgspec.structs.replace(after, engines=before.engines) == before
    reader.verify_files(tmp_path / "lenet5" / "1", after)
    with pytest.raises(BuildError, match=r"version 1 has tensorrt-fp16-sm120-\S+ already"):
        build("lenet5", order)
    assert manifest_of(tmp_path) == after
    assert {path.name for path in (tmp_path / "lenet5").iterdir()} == {"1"}, "nothing is left over"


def test_an_engine_can_be_added_to_what_is_there_only(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no sound version of lenet5 to add an engine to"):
        build("lenet5", Order(repo=tmp_path, backend="tensorrt", add=True))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"backend": "tensorrt,abacus"}, "backend 'abacus' is unknown"),
        ({"backend": "null,tensorrt"}, "null must be alone"),
        ({"backend": "tensorrt,tensorrt"}, "several must differ"),
        ({"backend": "null", "add": True}, "can't be added"),
        ({"opt_batch": 9, "max_batch": 8}, "opt_batch must be 1 to 8, not 9"),
        ({"min_batch": 5, "opt_batch": 4}, "min_batch must be 1 to 4, not 5"),
    ],
)
def test_an_order_without_sense_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Order(repo=Path(), **fields)


# --- at work ---------------------------------------------------------------------------------


@pytest.fixture
def tape() -> Tape:
    return Tape()


def record_of(**fields: Any) -> EngineRecord:
    usual: dict[str, Any] = {
        "name": "taped",
        "backend": "tensorrt",
        "backend_version": "rtx 1",
        "precision": "fp16",
        "hardware": "sm89",
        "max_batch": 6,
        "files": (),
        "deviation": {},
    }
    return EngineRecord(**usual | fields)


def taped(tape: Tape, contexts: int = 2, **fields: Any) -> tensorrt.TensorRtEngine:
    made = [TapedContext(tape, SHAPE, CLASSES) for _ in range(contexts)]
    return tensorrt.TensorRtEngine(tape, made, record_of(**fields), SHAPE, WIDTHS, LAYERS_BYTES)


@pytest.fixture
def engine(tape: Tape) -> Iterator[tensorrt.TensorRtEngine]:
    engine = taped(tape)
    yield engine
    tape.held.set()
    engine.close()
    assert not tape.live, "everything was given back"


def rows(*classes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pixels = np.zeros((len(classes), *SHAPE), np.uint8)
    pixels[:, 0, 0, 0] = classes
    return pixels


def test_sizes_are_powers_of_two_and_the_ends_of_the_range() -> None:
    assert graph_sizes(record_of(max_batch=6)) == [1, 2, 4, 6]
    assert graph_sizes(record_of(max_batch=8, opt_batch=5)) == [1, 2, 4, 5, 8]
    assert graph_sizes(record_of(max_batch=1)) == [1]
    assert graph_sizes(record_of(max_batch=16, min_batch=3)) == [3, 4, 8, 16]


def test_every_number_of_rows_gets_its_own_answers(engine: tensorrt.TensorRtEngine) -> None:
    for instance in engine.instances:
        for count in (6, 1, 5, 2, 4, 3):
            asked = [(3 * count + row) % CLASSES for row in range(count)]
            answer = infer(instance, rows(*asked))
            assert answer.classes[:, 0].tolist() == asked
            assert answer.probabilities.shape == (count, CLASSES)


def test_a_graph_is_captured_once_a_size_and_a_batch_is_one_launch(
    tape: Tape, engine: tensorrt.TensorRtEngine
) -> None:
    assert tape.names().count("begin_capture") == 4 * len(engine.instances)
    assert all(instance.captured == [1, 2, 4, 6] for instance in engine.instances)
    tape.calls.clear()
    for count in (1, 3, 6, 3):
        infer(engine.instances[0], rows(*[1] * count))
    assert tape.names() == ["launch", "record", "wait"] * 4
    graphs = [call[1] for call in tape.calls if call[0] == "launch"]
    assert graphs[1] == graphs[3]
    assert len(set(graphs)) == 3


def test_a_graph_copies_in_computes_and_copies_out_in_one_stream(tape: Tape) -> None:
    engine = taped(tape, contexts=1, max_batch=2)
    first, last = tape.names().index("begin_capture"), tape.names().index("end_capture")
    captured = tape.calls[first + 1 : last]
    stream = tape.calls[first][1]
    assert captured == [
        ("copy_in", 6, stream),
        ("execute", 1, stream),
        ("copy_out", 8, stream),
        ("copy_out", 8, stream),
        ("copy_out", 4 * CLASSES, stream),
    ]
    assert tape.calls[first - 1] == ("finish", stream), "it had run once before"
    engine.close()


def test_one_batch_is_copied_while_the_other_computes_and_nothing_is_read_before_its_event(
    tape: Tape, engine: tensorrt.TensorRtEngine
) -> None:
    left, right = engine.instances
    tape.held.clear()
    tape.calls.clear()
    answers: list[SimpleQueue[Outputs | Exception]] = [SimpleQueue(), SimpleQueue()]
    for instance, asked, queue in ((left, 1, answers[0]), (right, 2, answers[1])):
        instance.pixels[:1] = rows(asked)
        instance.start(1, queue.put)
    assert tape.names() == ["launch", "record"] * 2, "the second did not wait for the first"
    (_, left_graph, left_stream), _, (_, right_graph, right_stream), _ = tape.calls
    assert left_stream != right_stream
    assert left_graph != right_graph
    assert all(queue.empty() for queue in answers)
    tape.held.set()
    for queue, asked in zip(answers, (1, 2), strict=True):
        answer = queue.get()
        assert isinstance(answer, Outputs)
        assert answer.classes[:, 0].tolist() == [asked]


def test_a_batch_between_two_sizes_is_filled_up_and_the_filling_is_told(
    engine: tensorrt.TensorRtEngine,
) -> None:
    assert [engine.computed_rows(count) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_answers_are_the_callers_to_keep(engine: tensorrt.TensorRtEngine) -> None:
    first = infer(engine.instances[0], rows(1, 2))
    infer(engine.instances[0], rows(3, 4))
    assert first.classes[:, 0].tolist() == [1, 2]


def test_what_can_not_be_captured_is_enqueued_each_time(tape: Tape) -> None:
    context = TapedContext(tape, SHAPE, CLASSES, capturable=False)
    engine = tensorrt.TensorRtEngine(tape, [context], record_of(), SHAPE, WIDTHS, LAYERS_BYTES)
    assert "begin_capture" not in tape.names()
    assert engine.instances[0].captured == []
    tape.calls.clear()
    answer = infer(engine.instances[0], rows(1, 2, 3))
    assert answer.classes[:, 0].tolist() == [1, 2, 3]
    assert tape.names() == ["shape", "copy_in", "execute", *["copy_out"] * 3, "record", "wait"]
    engine.close()


@pytest.mark.parametrize("call", ["launch", "record", "wait"])
def test_a_failed_call_fails_its_batch_and_the_next_one_runs(
    call: str, tape: Tape, engine: tensorrt.TensorRtEngine
) -> None:
    instance = engine.instances[0]
    tape.fail[call] = "cudaErrorLaunchOutOfResources"
    with pytest.raises(EngineFailure, match="cudaErrorLaunchOutOfResources") as caught:
        infer(instance, rows(1))
    assert not isinstance(caught.value, DeviceLost)
    tape.fail.clear()
    assert infer(instance, rows(2)).classes[0, 0] == 2


@pytest.mark.parametrize("call", ["launch", "wait"])
def test_a_sticky_error_says_that_the_device_is_lost(
    call: str, tape: Tape, engine: tensorrt.TensorRtEngine
) -> None:
    tape.fail[call] = "cudaErrorIllegalAddress"
    with pytest.raises(DeviceLost, match="cudaErrorIllegalAddress"):
        infer(engine.instances[0], rows(1))


@pytest.mark.parametrize("lost", [False, True])
def test_a_batch_that_tensorrt_can_not_run_is_answered_and_cuda_says_whether_the_device_is_lost(
    tape: Tape, *, lost: bool
) -> None:
    context = TapedContext(tape, SHAPE, CLASSES, capturable=False)
    engine = tensorrt.TensorRtEngine(tape, [context], record_of(), SHAPE, WIDTHS, LAYERS_BYTES)
    context.runs = False
    tape.fail = {"finish": "cudaErrorIllegalAddress"} if lost else {}
    with pytest.raises(EngineFailure) as caught:
        infer(engine.instances[0], rows(1))
    assert isinstance(caught.value, DeviceLost) == lost
    assert tape.names()[-1] == "finish", "nothing of the batch ran any more when it was answered"
    tape.fail, context.runs = {}, True
    assert infer(engine.instances[0], rows(2)).classes[0, 0] == 2
    engine.close()


def test_a_size_that_is_no_longer_taken_fails_its_batch(tape: Tape) -> None:
    context = TapedContext(tape, SHAPE, CLASSES, capturable=False)
    engine = tensorrt.TensorRtEngine(tape, [context], record_of(), SHAPE, WIDTHS, LAYERS_BYTES)
    context.takes = lambda rows: False
    with pytest.raises(EngineFailure, match="takes no batch of 4"):
        infer(engine.instances[0], rows(1, 2, 3))
    engine.close()


def test_sticky_errors_are_errors_that_cuda_has() -> None:
    from cuda.bindings import runtime

    assert set(runtime.cudaError_t.__members__) >= cuda.STICKY


# Of every call, made-up numbers of the kind it gets.
CALLS: dict[str, tuple[int, ...]] = {
    "gpu": (),
    "pinned": (100,),
    "free_pinned": (4096,),
    "memory": (100,),
    "free": (4096,),
    "copy_in": (4096, 8192, 100, 7),
    "copy_out": (4096, 8192, 100, 7),
    "stream": (),
    "free_stream": (7,),
    "event": (),
    "free_event": (7,),
    "record": (7, 8),
    "wait": (7,),
    "finish": (7,),
    "begin_capture": (7,),
    "end_capture": (7,),
    "launch": (7, 8),
    "free_graph": (7,),
}


def test_the_bindings_take_all_that_they_are_given() -> None:
    """NVIDIA's own: without a driver each call gets as far as to ask for one, and no further."""
    from cuda.bindings import runtime

    try:
        cuda.Cuda()
    except Absent:
        pass
    else:
        pytest.skip("made-up handles would be used")
    bindings = cuda.Cuda.__new__(cuda.Cuda)
    bindings._api = runtime
    public = {name for name in vars(cuda.Cuda) if not name.startswith("_")}
    assert set(CALLS) == public, "another call needs its line above"
    for name, arguments in CALLS.items():
        with pytest.raises(cuda.CudaError, match="InsufficientDriver|NoDevice"):
            getattr(bindings, name)(*arguments)
    graph = runtime.cudaGraph_t(7)  # what end_capture goes on with
    for name, given in (("cudaGraphInstantiate", (graph, 0)), ("cudaGraphDestroy", (graph,))):
        with pytest.raises(cuda.CudaError, match="InsufficientDriver|NoDevice"):
            bindings._call(name, *given)
    for handle in (runtime.cudaStream_t, runtime.cudaEvent_t, runtime.cudaGraphExec_t):
        assert int(handle(7)) == 7, "handles are plain numbers"


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
def test_where_capturing_fails_batches_are_enqueued(call: str, tape: Tape) -> None:
    tape.fail[call] = "cudaErrorStreamCaptureUnsupported"
    engine = taped(tape, contexts=1)
    assert infer(engine.instances[0], rows(1, 2, 3)).classes[:, 0].tolist() == [1, 2, 3]
    assert "launch" not in tape.names()
    engine.close()


@pytest.mark.parametrize("call", ["memory", "copy_in", "finish", "end_capture"])
def test_a_failed_load_leaves_nothing_behind(call: str, tape: Tape) -> None:
    threads = threading.active_count()
    for _ in range(200):
        tape.fail[call] = "cudaErrorLaunchFailure"
        with pytest.raises(cuda.CudaError):
            taped(tape)
        assert not tape.live
    assert threading.active_count() == threads


def test_a_size_that_the_plan_does_not_take_is_told_and_leaves_nothing_behind(tape: Tape) -> None:
    context = TapedContext(tape, SHAPE, CLASSES)
    context.takes = lambda rows: rows < 4
    with pytest.raises(EngineFailure, match="takes no batch of 4"):
        tensorrt.TensorRtEngine(tape, [context], record_of(), SHAPE, WIDTHS, LAYERS_BYTES)
    assert not tape.live


# --- loading ---------------------------------------------------------------------------------


def library(kind: type[TapedLibrary], tape: Tape, monkeypatch: pytest.MonkeyPatch) -> TapedLibrary:
    """From now on that is TensorRT, and the tape CUDA."""
    made = kind(tape, SHAPE, CLASSES)
    monkeypatch.setattr(tensorrt, "Cuda", lambda: tape)
    monkeypatch.setattr(tensorrt, "_library", lambda variant: made)
    return made


def load(folder: Path, content: bytes = b"a plan") -> tensorrt.TensorRtEngine:
    (folder / "x.plan").write_bytes(content)
    files = (FileRecord(name="x.plan", bytes=len(content), sha256="0" * 64),)
    return tensorrt.load(folder, record_of(files=files), SHAPE, threads=1)


@pytest.mark.parametrize("kind", [TapedLibrary, TapedRtx])
def test_a_plan_of_either_flavour_is_loaded_runs_and_gives_everything_back(
    kind: type[TapedLibrary], tape: Tape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = library(kind, tape, monkeypatch)
    engine = load(tmp_path)
    assert len(found.contexts) == len(engine.instances) == tensorrt.INSTANCES
    for instance in engine.instances:
        assert infer(instance, rows(1, 2, 3)).classes[:, 0].tolist() == [1, 2, 3]
        assert instance.captured == [1, 2, 4, 6]
    assert tape.calls.count(("memory", found.layers_bytes)) == tensorrt.INSTANCES
    engine.close()
    assert not tape.live


def test_tensorrt_rtx_compiles_once_for_all_instances_and_captures_nothing_itself(
    tape: Tape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = library(TapedRtx, tape, monkeypatch)
    engine = load(tmp_path)
    gc.collect()
    config, *others = found.configs
    assert all(each is config for each in others)
    assert config.cuda_graph_strategy.name == "DISABLED"
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert config.runtime_cache() is not None, "it lives as long as the engine"
    engine.close()
    gc.collect()
    assert config.runtime_cache() is None


@pytest.mark.parametrize("call", ["gpu", "memory", "copy_in", "finish"])
def test_a_device_that_is_lost_is_told_by_a_load_too(
    call: str, tape: Tape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = library(TapedRtx, tape, monkeypatch)
    found.runs = call != "finish"  # TensorRT itself says no more than that
    for name, kind in (
        ("cudaErrorIllegalAddress", DeviceLost),
        ("cudaErrorUnknown", EngineFailure),
    ):
        tape.fail = {call: name}
        with pytest.raises(
            EngineFailure, match=rf"^TensorRT can't load x\.plan: {call}: {name}$"
        ) as caught:
            load(tmp_path)
        assert type(caught.value) is kind
        assert not tape.live


def test_a_plan_whose_layers_have_no_room_says_how_much_they_need(
    tape: Tape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = library(TapedLibrary, tape, monkeypatch)
    found.layers_bytes = 3 << 30
    tape.free_bytes = 5 << 30
    with pytest.raises(EngineFailure, match="needs 6,144 MiB .* 5,120 MiB are free; .*--max-batch"):
        load(tmp_path)
    assert not tape.live


def test_of_a_failed_load_only_its_own_errors_are_told(
    tape: Tape, tmp_path: Path, built_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TensorRT-RTX's own runtime and logger, of which there is one for the process."""
    monkeypatch.setattr(tensorrt, "Cuda", lambda: tape)
    trt = tensorrt._library("rtx")
    logger = tensorrt._notes(trt)
    logger.errors.append("of what failed before")
    with pytest.raises(EngineFailure, match=r"can't load x\.plan: ") as caught:
        load(tmp_path, b"damaged")
    assert logger.errors, "TensorRT was heard"
    assert "failed before" not in str(caught.value)
    assert "does not say why" not in str(caught.value)
    assert tensorrt._notes(trt) is logger


# --- the timing cache ------------------------------------------------------------------------


class Timings:
    """A builder's configuration as far as timing caches go. It takes only those it can read."""

    def __init__(self, *, refusing: str) -> None:
        self.refusing = refusing
        self.used: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" and self.refusing == "create" else content

    def set_timing_cache(self, content: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if content == b"damaged":
            return False
        self.used = content
        return True

    def get_timing_cache(self) -> Timings:
        return self

    def serialize(self) -> bytes:
        return (self.used or b"") + b"more"


@pytest.mark.parametrize("refusing", ["create", "set"])
def test_timings_are_kept_and_damaged_ones_begun_anew(refusing: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    found: list[bytes | None] = []
    for damage in (False, False, True, False):
        config = Timings(refusing=refusing)
        if damage:
            next(folder.iterdir()).write_bytes(b"damaged")
        with tensorrt._TimingCache(TapedLibrary, config, "tensorrt", ADA, folder):
            found.append(config.used)
    assert found == [b"", b"more", b"", b"more"]
    assert [path.name for path in folder.iterdir()] == ["tensorrt-1-sm89.timing"]
