"""Inference, the same for every protocol: route, check, admit, make pixels, wait, measure.

A protocol translates its message to an InferenceRequest, and the InferenceResponse to its message.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from server.api.content import Content
from server.api.context import CallContext
from server.api.decoders import DecoderQueue, Decoders
from server.api.visible_models import VisibleModels
from server.engines.base import Outputs, RowSource
from server.errors import InvalidInput, ServingError
from server.execution.device import Reservation
from server.models.version import LoadedModel
from server.scheduling.base import PRIORITIES
from server.security.principal import ANONYMOUS
from server.security.quota import Quotas
from server.telemetry.clock import clock
from server.telemetry.principal_metrics import PrincipalMetrics

log = logging.getLogger(__name__)

MAX_REQUEST_ID = 128  # characters
DEFAULT_TOP_K = 5


class OutputSelection(ABC):
    """The outputs that a request asks for, for requests that want more than the best classes."""

    __slots__ = ()

    @abstractmethod
    def check(self, model: LoadedModel, images: int) -> None:
        """Raises InvalidInput if the model lacks an output, or if an output has too little room."""


@dataclass(slots=True)
class InferenceRequest:
    """One request in plain values."""

    model: str
    version: int  # 0 if the request names none
    label: str  # "stable" or "canary"; empty if the request names none
    request_id: str
    content: Content
    deadline_s: float  # on the server's clock; infinite if the request has none
    priority: int  # 0 to 9; 9 is the most urgent
    top_k: int = 0  # best classes to return; 0 is the default
    outputs: OutputSelection | None = None
    request_id_field: str = "request_id"  # name of request_id in the message, for errors


@dataclass(slots=True)
class InferenceResponse:
    """Outputs for each image of one request, and where its time went."""

    model: LoadedModel
    request_id: str
    images: int
    outputs: Outputs
    decode_s: float  # from arrival until the pixels were there
    queue_s: float  # from then until the first batch started
    compute_s: float  # from then until the last batch was done
    batch_rows: tuple[int, ...]  # rows of each batch that carried some of the images
    done_s: float  # when the last batch was done, on the server's clock


class Inference:
    """Runs inference requests. Used on the event loop's thread only."""

    def __init__(
        self,
        models: VisibleModels,
        decoders: DecoderQueue,
        quotas: Quotas,
        principal_metrics: PrincipalMetrics,
        *,
        max_images: int,
    ) -> None:
        self.max_images = max_images  # in one request
        self._models = models
        self._decoders = decoders
        self._quotas = quotas
        self._principal_metrics = principal_metrics

    async def infer(self, request: InferenceRequest, context: CallContext) -> InferenceResponse:
        """Runs one request. The caller must end with `complete` or `discard`.

        Raises every kind of ServingError.
        """
        model = self._models.route(
            context.caller.principal,
            request.model,
            request.version,
            request.label,
            request.request_id,
        )
        context.set_model(model.name, model.version_text)
        _check(request, model)
        images = request.content.count(model, self.max_images)
        if request.outputs is not None:
            request.outputs.check(model, images)
        try:
            decoders = self._decoders.of(context.caller.principal)
            reservation = self._admit(model, images, request, context, decoders)
            try:
                made = request.content.pixels(model.spec, decoders)
                pixels = made if isinstance(made, (np.ndarray, RowSource)) else await made
            except BaseException:
                reservation.release()
                raise
            decoded_s = clock()
            context.stage = "queue"
            try:
                answer = await reservation.run(pixels)
            finally:
                if reservation.has_started:
                    context.stage = "compute"
        except BaseException:
            context.after_response(model.metrics.failed, clock() - context.arrived_s)
            raise
        return InferenceResponse(
            model,
            request.request_id,
            images,
            answer.outputs,
            decoded_s - context.arrived_s,
            answer.queue_s,
            answer.compute_s,
            answer.batch_rows,
            answer.done_s,
        )

    def _admit(
        self,
        model: LoadedModel,
        images: int,
        request: InferenceRequest,
        context: CallContext,
        decoders: Decoders,
    ) -> Reservation:
        """Reserves time for a request, within the quota of its principal.

        The time to decode its images counts. They are decoded only if it is admitted.

        An admitted request is charged for good, even if it fails later: the server works for it.
        A request that the scheduler refuses costs nothing.
        """
        principal = context.caller.principal
        work = request.content.thread_work(model.spec)
        has_quota = principal.images_per_s < math.inf
        if has_quota:
            self._quotas.charge(principal, images, clock())
        try:
            return model.executor.admit(
                model.key,
                images,
                deadline_s=request.deadline_s,
                priority=request.priority,
                principal=principal,
                ready_in_s=decoders.ready_in_s(work) if work else 0.0,
                trace=context.trace,
            )
        except ServingError:
            if has_quota:
                self._quotas.refund(principal, images)
            raise

    def complete(self, response: InferenceResponse, context: CallContext) -> float:
        """Records the phases of a request whose response message is built.

        Returns the seconds since the request arrived.
        """
        ended_s = clock()
        model = response.model
        respond_s = ended_s - response.done_s
        total_s = ended_s - context.arrived_s
        model.executor.response_delay.record(respond_s, ended_s)
        phases_s = response.decode_s, response.queue_s, response.compute_s, respond_s
        context.after_response(model.metrics.answered, response.images, *phases_s)
        principal = context.caller.principal.name
        if principal != ANONYMOUS:
            answered = self._principal_metrics.images_answered
            context.after_response(answered, principal, response.images)
        if context.trace is not None:
            context.trace.phases(model.name, response.images, *phases_s)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "request_answered",
                extra={
                    "model": model.name,
                    "version": model.manifest.version,
                    "images": response.images,
                    "total_ms": total_s * 1e3,
                    "request_id": response.request_id,
                    "principal": context.caller.principal.name,
                },
            )
        return total_s

    def discard(self, response: InferenceResponse, context: CallContext) -> None:
        """Records a request as failed: its response could not be delivered."""
        failed = response.model.metrics.failed
        context.after_response(failed, clock() - context.arrived_s)


def best_classes(outputs: Outputs, count: int) -> Iterator[Iterable[tuple[int, float]]]:
    """For each row its `count` best classes with their scores, best first."""
    # One conversion for all rows: reading single numbers from numpy costs ten times as much.
    for classes, scores in zip(
        outputs.classes[:, :count].tolist(), outputs.scores[:, :count].tolist(), strict=True
    ):
        yield zip(classes, scores, strict=True)


def _check(request: InferenceRequest, model: LoadedModel) -> None:
    """Checks the fields that do not belong to the content. Raises InvalidInput."""
    max_top_k = model.manifest.top_k
    if request.top_k > max_top_k:
        raise InvalidInput(
            "top_k", f"is {request.top_k}; this model gives 1 to {max_top_k}, or 0 for the default"
        )
    if len(request.request_id) > MAX_REQUEST_ID:
        # A longer one would not fit into responses and logs.
        raise InvalidInput(
            request.request_id_field,
            f"has {len(request.request_id)} characters; at most {MAX_REQUEST_ID} are allowed",
        )
    if request.priority not in PRIORITIES:
        raise InvalidInput(
            "priority",
            f"is {request.priority}; 0 (the default) to {PRIORITIES[-1]} are allowed",
        )
