"""Adapter for convserve's own contract, convserve.v1.Classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convserve_client.async_client import AsyncClient
from convserve_client.loadgen.images import in_turn, load_files, load_pixels
from convserve_client.loadgen.plan import Plan, RequestClass
from convserve_client.loadgen.protocols.adapter import AnswerTotals, RequestBuilder
from convserve_client.stubs import classify_pb2 as pb

CLASSIFY = "/convserve.v1.Classifier/Classify"
MAX_LIBRARY = 128  # different images at most, for any number of samples


class ClassifyAdapter:
    """Sends pixels or image files to convserve.v1.Classifier/Classify."""

    method = CLASSIFY

    def __init__(self) -> None:
        self._answered_by = "", 0, False  # by whom the last answer was given

    async def prepare_requests(self, plan: Plan, request_class: RequestClass) -> list[bytes]:
        shape = await _input_shape(plan, request_class)
        return classify_requests(plan, request_class, shape)

    async def sample_library(
        self, plan: Plan, request_class: RequestClass, samples: int
    ) -> RequestBuilder:
        shape = await _input_shape(plan, request_class)
        return classify_library(plan, request_class, shape, samples)

    def read_answer(self, answer: bytes, totals: AnswerTotals) -> float:
        response = pb.ClassifyResponse.FromString(answer)
        timing = response.timing
        totals.answers += 1
        phases_ms = totals.phases_ms
        phases_ms[0] += timing.decode_ms
        phases_ms[1] += timing.queue_ms
        phases_ms[2] += timing.compute_ms
        phases_ms[3] += timing.total_ms
        answered_by = response.model, response.version, response.trained
        if answered_by != self._answered_by or not totals.answered_by:
            self._answered_by = answered_by
            totals.answered_by.add((response.model, str(response.version), response.trained))
        rows = timing.batch_rows
        count = len(rows)
        if count == 1:
            return float(rows[0])
        return sum(rows) / count if count else 0.0


async def _input_shape(plan: Plan, request_class: RequestClass) -> tuple[int, int, int]:
    async with AsyncClient(
        plan.target,
        tls=plan.access.tls,
        token=plan.access.token or None,
        allow_plaintext_token=plan.access.allow_plaintext_token,
    ) as client:
        info = await client.get_model(request_class.model, request_class.version)
    return info.input_shape


def classify_requests(
    plan: Plan, request_class: RequestClass, shape: tuple[int, int, int]
) -> list[bytes]:
    """Requests for a model with the input shape [H, W, C]. Raises OSError or ImportError."""
    images = request_class.images
    request = _request_head(request_class)
    requests = []
    if plan.input == "raw" or plan.raw:
        for group in in_turn(load_pixels(plan.input, images, *shape), images):
            request.pixels.CopyFrom(_pixels(images, shape, np.stack(group).tobytes()))
            requests.append(request.SerializeToString())
        return requests
    for group in in_turn(load_files(plan.input, images), images):
        del request.images[:]
        for content in group:
            request.images.add(encoded=content)
        requests.append(request.SerializeToString())
    return requests


def classify_library(
    plan: Plan, request_class: RequestClass, shape: tuple[int, int, int], samples: int
) -> RequestBuilder:
    """See `ProtocolAdapter.sample_library`. Raises OSError or ImportError."""
    head = _request_head(request_class).SerializeToString()
    different = min(samples, MAX_LIBRARY)
    if plan.input == "raw" or plan.raw:
        rows = [one.tobytes() for one in load_pixels(plan.input, different, *shape)]

        def build_raw(indices: Sequence[int]) -> bytes:
            data = b"".join([rows[index % len(rows)] for index in indices])
            request = pb.ClassifyRequest(pixels=_pixels(len(indices), shape, data))
            return head + request.SerializeToString()

        return build_raw
    contents = [
        pb.ClassifyRequest(images=[pb.Image(encoded=content)]).SerializeToString()
        for content in load_files(plan.input, different)
    ]
    # Serialised messages that are joined are one message with the fields of all.
    return lambda indices: head + b"".join([contents[n % len(contents)] for n in indices])


def _request_head(request_class: RequestClass) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(
        model=request_class.model,
        version=request_class.version,
        priority=request_class.priority,
    )


def _pixels(count: int, shape: tuple[int, int, int], data: bytes) -> pb.RawImages:
    height, width, channels = shape
    return pb.RawImages(count=count, height=height, width=width, channels=channels, data=data)
