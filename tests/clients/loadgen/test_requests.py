"""Requests hold what the plan says, in the terms of each protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convserve_client.loadgen.images import in_turn, load_files, load_pixels, synthetic_image
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.protocols import open_inference_messages as oip
from convserve_client.loadgen.protocols.adapter import UnsupportedModel
from convserve_client.loadgen.protocols.classify import (
    classify_library,
    classify_requests,
)
from convserve_client.loadgen.protocols.open_inference import infer_requests
from convserve_client.stubs import classify_pb2 as pb

SHAPE = (8, 6, 1)


Metadata: Any = oip.ModelMetadataResponse


def make_plan(**changes: Any) -> Plan:
    return Plan(target="127.0.0.1:1", classes=(RequestClass(model="small"),), **changes)


def request_class(**changes: Any) -> RequestClass:
    return RequestClass(model="small", **changes)


def test_raw_requests_have_the_models_shape_and_are_repeatable() -> None:
    (message,) = classify_requests(make_plan(), request_class(images=3, priority=2), SHAPE)
    request = pb.ClassifyRequest.FromString(message)
    images = request.pixels
    assert (images.count, images.height, images.width, images.channels) == (3, 8, 6, 1)
    assert len(images.data) == 3 * 8 * 6
    assert request.priority == 2
    assert [message] == classify_requests(make_plan(), request_class(images=3, priority=2), SHAPE)


def test_a_folder_of_files_is_sent_in_turn(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    prepared = classify_requests(make_plan(input=str(tmp_path)), request_class(images=2), SHAPE)
    sent = [
        [image.encoded for image in pb.ClassifyRequest.FromString(message).images]
        for message in prepared
    ]
    assert sent == [[b"a", b"b"], [b"c", b"a"]]


def test_synthetic_jpegs_are_about_as_long_as_photographs() -> None:
    first, *_ = classify_requests(make_plan(input="jpeg"), request_class(), (224, 224, 3))
    (image,) = pb.ClassifyRequest.FromString(first).images
    assert image.encoded.startswith(b"\xff\xd8")
    assert 40_000 < len(image.encoded) < 160_000  # ImageNet's have 110 kB on average


def test_synthetic_images_use_the_range_of_a_byte() -> None:
    made = synthetic_image(64, 64, 3, seed=1)
    assert (made.shape, made.dtype) == ((64, 64, 3), "uint8")
    assert made.max() - made.min() > 100


def test_photographs_and_digits_are_files_or_pixels() -> None:
    photographs, digits = load_files("photographs", 1), load_files("digits", 1)
    assert all(content.startswith(b"\xff\xd8") for content in photographs)
    assert all(content.startswith(b"\x89PNG") for content in digits)
    assert len(set(digits)) > 200
    assert [one.shape for one in load_pixels("photographs", 1, 10, 12, 3)] == [(10, 12, 3)] * 2
    messages = classify_requests(
        make_plan(input="digits", raw=True), request_class(images=64), (32, 32, 1)
    )
    images = pb.ClassifyRequest.FromString(messages[0]).pixels
    assert (images.count, images.height, len(images.data)) == (64, 32, 64 * 32 * 32)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains no files"):
        load_files(str(tmp_path), 1)


@pytest.mark.parametrize("source", ["raw", "jpeg"])
def test_a_sample_library_makes_a_request_of_any_samples(source: str) -> None:
    request = classify_library(make_plan(input=source), request_class(images=4), SHAPE, samples=24)
    one, both = (pb.ClassifyRequest.FromString(request(indices)) for indices in ([5], [5, 6]))
    assert (one.model, both.model) == ("small", "small")
    if source == "raw":
        assert both.pixels.count == 2
        assert both.pixels.data.startswith(one.pixels.data)
        assert len(both.pixels.data) == 2 * len(one.pixels.data)
    else:
        assert list(both.images)[:1] == list(one.images)
        assert len(both.images) == 2


def metadata(*tensors: tuple[str, str, list[int]]) -> Any:
    Tensor = Metadata.TensorMetadata
    return Metadata(
        name="small",
        inputs=[
            Tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in tensors
        ],
    )


def sent(message: bytes) -> oip.ModelInferRequest:
    return oip.ModelInferRequest.FromString(message)


def test_convserves_metadata_allows_pixels_or_files() -> None:
    ours = metadata(("image", "UINT8", [-1, 8, 6, 3]), ("encoded", "BYTES", [-1]))
    (message,) = infer_requests(make_plan(), request_class(images=2, priority=1, version=4), ours)
    request = sent(message)
    assert (request.model_name, request.model_version) == ("small", "4")
    assert request.parameters["priority"].int64_param == 1
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("image", [2, 8, 6, 3])
    ]
    assert len(request.raw_input_contents[0]) == 2 * 8 * 6 * 3
    first, *_ = infer_requests(make_plan(input="jpeg"), request_class(images=2), ours)
    encoded = sent(first)
    assert [(tensor.name, list(tensor.shape)) for tensor in encoded.inputs] == [("encoded", [2])]
    content = encoded.raw_input_contents[0]
    assert content[4:6] == b"\xff\xd8"
    length = int.from_bytes(content[:4], "little")
    assert content[4 + length + 4 : 4 + length + 6] == b"\xff\xd8"


def test_float_tensors_with_channels_first_get_the_same_image_scaled_to_1() -> None:
    other = metadata(("data_0", "FP32", [-1, 3, 8, 6]))
    request = sent(infer_requests(make_plan(), request_class(), other)[0])
    values = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(3, 8, 6)
    expected = synthetic_image(8, 6, 3, seed=0).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_an_open_shape_must_be_given() -> None:
    open_shape = metadata(("x", "UINT8", [-1, -1, -1, 3]), ("size", "INT64", [-1, 2]))
    with pytest.raises(UnsupportedModel, match="use --shape x:D,D"):
        infer_requests(make_plan(), request_class(), open_shape)
    said = make_plan(shapes=(("x", (1, 10, 12, 3)),), outputs=("y",))
    request = sent(infer_requests(said, request_class(), open_shape)[0])
    assert [list(tensor.shape) for tensor in request.inputs] == [[1, 10, 12, 3], [1, 2]]
    assert [len(content) for content in request.raw_input_contents] == [360, 16]
    assert [output.name for output in request.outputs] == ["y"]
    with pytest.raises(UnsupportedModel, match=r"--shape z: .* it has x, size"):
        infer_requests(make_plan(shapes=(("z", (1,)),)), request_class(), open_shape)


def test_unsupported_inputs_are_rejected_with_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel, match="has the type BF16; BOOL, UINT8"):
        infer_requests(make_plan(), request_class(), metadata(("x", "BF16", [-1, 4])))
    with pytest.raises(UnsupportedModel, match="takes image files; use --input jpeg"):
        infer_requests(make_plan(), request_class(), metadata(("x", "BYTES", [-1])))
    with pytest.raises(UnsupportedModel, match="does not fit 2 images"):
        infer_requests(make_plan(), request_class(images=2), metadata(("x", "FP32", [1, 3, 8, 6])))
    with pytest.raises(UnsupportedModel, match="lists no inputs"):
        infer_requests(make_plan(), request_class(), metadata())


def test_groups_start_again_at_the_first_content() -> None:
    assert in_turn("abc", 2) == [["a", "b"], ["c", "a"]]
