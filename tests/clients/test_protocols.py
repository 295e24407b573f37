"""Requests hold what was asked for, in the words of each protocol; other servers' metadata too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convserve_client.loadgen import open_inference as oip
from convserve_client.loadgen.arguments import parsed
from convserve_client.loadgen.images import (
    files,
    in_turn,
    picture,
    pixels,
)
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import Kind, Plan, mixed
from convserve_client.loadgen.protocols import (
    Unaskable,
    classify_library,
    classify_requests,
    infer_requests,
)
from convserve_client.stubs import classify_pb2 as pb
from tests.support.serving import (
    Mirror,
    loading,
    publish,
    serve,
)

SHAPE = (8, 6, 1)
Metadata: Any = oip.ModelMetadataResponse


def plan(**changes: Any) -> Plan:
    return Plan(target="127.0.0.1:1", kinds=(Kind(model="small"),), **changes)


def kind(**changes: Any) -> Kind:
    return Kind(model="small", **changes)


# --- classify --------------------------------------------------------------------------------


def test_raw_requests_have_the_models_shape_and_are_the_same_every_time() -> None:
    (message,) = classify_requests(plan(), kind(images=3, priority=2), SHAPE)
    request = pb.ClassifyRequest.FromString(message)
    images = request.pixels
    assert (images.count, images.height, images.width, images.channels) == (3, 8, 6, 1)
    assert len(images.data) == 3 * 8 * 6
    assert request.priority == 2
    assert [message] == classify_requests(plan(), kind(images=3, priority=2), SHAPE)


def test_a_folder_of_files_is_sent_in_turn(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    prepared = classify_requests(plan(input=str(tmp_path)), kind(images=2), SHAPE)
    sent = [
        [image.encoded for image in pb.ClassifyRequest.FromString(message).images]
        for message in prepared
    ]
    assert sent == [[b"a", b"b"], [b"c", b"a"]]


def test_made_up_jpegs_are_about_as_long_as_photographs() -> None:
    first, *_ = classify_requests(plan(input="jpeg"), kind(), (224, 224, 3))
    (image,) = pb.ClassifyRequest.FromString(first).images
    assert image.encoded.startswith(b"\xff\xd8")
    assert 40_000 < len(image.encoded) < 160_000  # ImageNet's have 110 kB on average


def test_pictures_use_the_range_of_a_byte() -> None:
    made = picture(64, 64, 3, seed=1)
    assert (made.shape, made.dtype) == ((64, 64, 3), "uint8")
    assert made.max() - made.min() > 100


def test_photographs_and_digits_are_files_and_become_pixels_where_asked() -> None:
    photographs, digits = files("photographs", 1), files("digits", 1)
    assert all(content.startswith(b"\xff\xd8") for content in photographs)
    assert all(content.startswith(b"\x89PNG") for content in digits)
    assert len(set(digits)) > 200
    assert [one.shape for one in pixels("photographs", 1, 10, 12, 3)] == [(10, 12, 3)] * 2
    messages = classify_requests(plan(input="digits", raw=True), kind(images=64), (32, 32, 1))
    images = pb.ClassifyRequest.FromString(messages[0]).pixels
    assert (images.count, images.height, len(images.data)) == (64, 32, 64 * 32 * 32)


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file in"):
        files(str(tmp_path), 1)


@pytest.mark.parametrize("source", ["raw", "jpeg"])
def test_a_library_makes_a_call_of_any_samples(source: str) -> None:
    request = classify_library(plan(input=source), kind(images=4), SHAPE, samples=24)
    one, both = (pb.ClassifyRequest.FromString(request(indices)) for indices in ([5], [5, 6]))
    assert (one.model, both.model) == ("small", "small")
    if source == "raw":
        assert both.pixels.count == 2
        assert both.pixels.data.startswith(one.pixels.data)
        assert len(both.pixels.data) == 2 * len(one.pixels.data)
    else:
        assert list(both.images)[:1] == list(one.images)
        assert len(both.images) == 2


# --- oip -------------------------------------------------------------------------------------


def metadata(*tensors: tuple[str, str, list[int]]) -> Any:
    Tensor = Metadata.TensorMetadata
    return Metadata(
        name="small",
        inputs=[Tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in tensors],
    )


def sent(message: bytes) -> oip.ModelInferRequest:
    return oip.ModelInferRequest.FromString(message)


def test_our_own_metadata_gives_pixels_or_files_as_asked() -> None:
    ours = metadata(("image", "UINT8", [-1, 8, 6, 3]), ("encoded", "BYTES", [-1]))
    (message,) = infer_requests(plan(), kind(images=2, priority=1, version=4), ours)
    request = sent(message)
    assert (request.model_name, request.model_version) == ("small", "4")
    assert request.parameters["priority"].int64_param == 1
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("image", [2, 8, 6, 3])
    ]
    assert len(request.raw_input_contents[0]) == 2 * 8 * 6 * 3
    first, *_ = infer_requests(plan(input="jpeg"), kind(images=2), ours)
    encoded = sent(first)
    assert [(tensor.name, list(tensor.shape)) for tensor in encoded.inputs] == [("encoded", [2])]
    content = encoded.raw_input_contents[0]
    assert content[4:6] == b"\xff\xd8"
    length = int.from_bytes(content[:4], "little")
    assert content[4 + length + 4 : 4 + length + 6] == b"\xff\xd8"


def test_a_model_of_floats_channels_first_gets_the_same_picture_from_0_to_1() -> None:
    other = metadata(("data_0", "FP32", [-1, 3, 8, 6]))
    request = sent(infer_requests(plan(), kind(), other)[0])
    values = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(3, 8, 6)
    expected = picture(8, 6, 3, seed=0).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_a_shape_that_is_left_open_must_be_said_and_is_then_taken() -> None:
    open_shape = metadata(("x", "UINT8", [-1, -1, -1, 3]), ("size", "INT64", [-1, 2]))
    with pytest.raises(Unaskable, match="say --shape x:D,D"):
        infer_requests(plan(), kind(), open_shape)
    said = plan(shapes=(("x", (1, 10, 12, 3)),), outputs=("y",))
    request = sent(infer_requests(said, kind(), open_shape)[0])
    assert [list(tensor.shape) for tensor in request.inputs] == [[1, 10, 12, 3], [1, 2]]
    assert [len(content) for content in request.raw_input_contents] == [360, 16]
    assert [output.name for output in request.outputs] == ["y"]
    with pytest.raises(Unaskable, match=r"--shape z: .* it has x, size"):
        infer_requests(plan(shapes=(("z", (1,)),)), kind(), open_shape)


def test_what_cant_be_sent_says_what_can() -> None:
    with pytest.raises(Unaskable, match="is of type BF16; BOOL, UINT8"):
        infer_requests(plan(), kind(), metadata(("x", "BF16", [-1, 4])))
    with pytest.raises(Unaskable, match="takes image files; say --input jpeg"):
        infer_requests(plan(), kind(), metadata(("x", "BYTES", [-1])))
    with pytest.raises(Unaskable, match="can't be filled with 2 images"):
        infer_requests(plan(), kind(images=2), metadata(("x", "FP32", [1, 3, 8, 6])))
    with pytest.raises(Unaskable, match="names no inputs"):
        infer_requests(plan(), kind(), metadata())


@pytest.mark.parametrize("protocol", ["classify", "oip"])
async def test_both_protocols_measure_one_server_and_its_own_counters_agree(
    tmp_path: Path, protocol: Any
) -> None:
    publish(tmp_path, trained=True)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        asked = Plan(
            target=served.target,
            protocol=protocol,
            kinds=(Kind(model="tiny", images=3, deadline_ms=20_000),),
            concurrency=None,
            rate_hz=100,
            warmup_s=0.3,
            duration_s=0.5,
            metrics_url=served.http + "/metrics",
            server_pids=(os.getpid(),),
        )
        report = await measure(asked)
    assert report.metrics is not None, report.metrics_missing
    assert report.summary.counts.keys() == {"OK"}
    # Read at the window's edges, so calls on their way then may stand on either side.
    assert abs(report.metrics.calls - report.summary.succeeded) <= 20
    assert report.metrics.images == 3 * report.metrics.calls
    assert report.server.answered_by == {("tiny", "1", True)}
    assert report.metrics.cpu_s is not None
    assert report.server_cpu_s is not None
    assert report.server_cpu_s == pytest.approx(report.metrics.cpu_s, abs=0.3)
    told = report.as_json()["server_metrics"]
    assert told["phases_ms"]["compute"]["p50"] <= told["phases_ms"]["compute"]["p99"]


async def test_metrics_that_cant_be_read_are_told_and_stop_nothing(tmp_path: Path) -> None:
    publish(tmp_path)
    async with serve(tmp_path, load=loading(Mirror)) as served:
        asked = Plan(
            target=served.target,
            kinds=(Kind(model="tiny", deadline_ms=20_000),),
            concurrency=1,
            warmup_s=0.0,
            duration_s=0.2,
            metrics_url=served.http + "/healthz",
        )
        report = await measure(asked)
    assert report.metrics is None
    assert "not" in report.metrics_missing
    assert report.summary.succeeded


# --- the command line ------------------------------------------------------------------------


def test_a_mix_is_every_combination_with_its_weight() -> None:
    kinds = mixed([("a", 3.0), ("b", 1.0)], [(1, 1.0), (8, 0.5)], [(0, 1.0)], [(50.0, 1.0)])
    assert [(one.model, one.images, one.weight) for one in kinds] == [
        ("a", 1, 3.0),
        ("a", 8, 1.5),
        ("b", 1, 1.0),
        ("b", 8, 0.5),
    ]


def test_the_command_line_says_what_is_asked() -> None:
    asked = parsed(
        "",
        [
            *("--target=oip://host:9", "--model=a=3,b", "--images-per-call=1,8=0.5"),
            *("--priority=0=9,2", "--deadline-ms=50", "--rate=10,20", "--arrivals=bursts"),
            *("--shape=x:1,2", "--outputs=y,z", "--objective=p99<15ms"),
        ],
    )
    assert (asked.plan.protocol, asked.plan.target) == ("oip", "host:9")
    assert len(asked.plan.kinds) == 8
    assert asked.rates_hz == (10, 20)
    assert asked.plan.concurrency is None
    assert asked.plan.shapes == (("x", (1, 2)),)
    assert asked.plan.outputs == ("y", "z")
    assert asked.plan.metrics_url == ""  # port 9 is nobody's usual one
    assert parsed("", ["--model=a"]).plan.metrics_url == "http://127.0.0.1:8000/metrics"
    assert parsed("", ["--model=a", "--metrics-url=none"]).plan.metrics_url == ""


def test_a_trace_is_repeated_and_stretched_to_a_rate(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("0\n1\n2\n")
    for options, times in (([], [0, 1, 2, 3, 4]), (["--rate=2"], [0, 0.5, 1, 1.5, 2])):
        asked = parsed("", ["--model=a", f"--trace={tmp_path}/trace", *options])
        due = asked.plan.due()
        assert [next(due)[0] for _ in range(5)] == pytest.approx(times)


def test_groups_begin_again_where_the_contents_end() -> None:
    assert in_turn("abc", 2) == [["a", "b"], ["c", "a"]]
