"""ModelInfer in plain values: what gRPC and REST have in common."""

from __future__ import annotations

import math

from server.api.content import Content, InvalidContent
from server.api.context import CallContext
from server.api.in_flight import InFlightLimits
from server.api.inference import Inference, InferenceRequest
from server.api.v2.inputs import TensorContent
from server.api.v2.outputs import TensorOutputs
from server.api.v2.shared_memory import CallWindows, SharedMemoryRegions
from server.api.v2.tensors import (
    Parameters,
    TensorRequest,
    TensorResponse,
    refuse_parameters,
    whole_number,
)
from server.api.v2.versions import parse_version
from server.errors import InvalidInput
from server.scheduling.base import PRIORITIES

# Parameters of responses.
TRAINED = "trained"
IGNORED_INPUT = "passed_over"  # name of the input that was not classified

MAX_TIMEOUT_US = (1 << 63) - 1


class TensorInference:
    """Runs requests of the Open Inference Protocol. `regions` is None without shared memory."""

    def __init__(
        self,
        inference: Inference,
        in_flight: InFlightLimits,
        regions: SharedMemoryRegions | None = None,
    ) -> None:
        self._inference = inference
        self._in_flight = in_flight
        self._regions = regions

    async def infer(self, request: TensorRequest, context: CallContext) -> TensorResponse:
        """Runs one request. `complete` must follow. Raises every kind of ServingError."""
        version = parse_version("model_version", request.version)
        windows = CallWindows(self._regions)
        tensors = TensorContent(
            request.inputs, request.raw_contents, windows, self._in_flight, context.caller.principal
        )
        outputs = TensorOutputs(request.outputs, windows)
        content: Content = tensors
        priority, timeout_s = 0, math.inf
        try:
            priority, timeout_s = _priority_and_timeout(request.parameters)
        except InvalidInput as error:
            content = InvalidContent(error)
        try:
            response = await self._inference.infer(
                InferenceRequest(
                    request.model,
                    version.number,
                    version.label,
                    request.request_id,
                    content,
                    min(context.deadline_s, context.arrived_s + timeout_s),
                    priority,
                    outputs=outputs,
                    request_id_field="id",
                ),
                context,
            )
            try:
                result = TensorResponse(response, outputs.tensors(response))
            except InvalidInput:  # a region has become too small
                self._inference.discard(response, context)
                raise
        finally:
            windows.close()
        result.parameters[TRAINED] = response.model.manifest.weights.trained
        if tensors.ignored:
            result.parameters[IGNORED_INPUT] = tensors.ignored
        return result

    def complete(self, response: TensorResponse, context: CallContext) -> None:
        """Records a request whose response message is built."""
        self._inference.complete(response.inference, context)


def _priority_and_timeout(parameters: Parameters) -> tuple[int, float]:
    """The scheduler's priority, and the seconds after arrival when the response is useless."""
    refuse_parameters("parameters", parameters)
    priority, timeout_s = 0, math.inf
    if "priority" in parameters:
        most_urgent = PRIORITIES[-1]
        given = whole_number("parameters[priority]", parameters["priority"], 0, most_urgent)
        # In Triton 1 is the most urgent, in our scheduler the highest. 0 is the default in both.
        priority = most_urgent + 1 - given if given else 0
    if "timeout" in parameters:
        field = "parameters[timeout]"
        timeout_us = whole_number(field, parameters["timeout"], 0, MAX_TIMEOUT_US)
        timeout_s = timeout_us / 1e6 or math.inf
    return priority, timeout_s
