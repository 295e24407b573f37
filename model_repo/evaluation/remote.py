"""Classifies images with a running server, through gRPC, by the Python client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import numpy as np

from convserve_client import AsyncClient, ClassifierError, InvalidInput, ModelInfo
from model_repo.evaluation.dataset import DataError, Sample
from model_repo.evaluation.metrics import TOP
from model_repo.evaluation.predictions import Predictions, empty

CALLS = 16  # at a time
TIMEOUT_S = 60.0

Progress = Callable[[int], None]


def model_of(server: str, name: str, version: int) -> ModelInfo:
    """The model that the server serves, with its labels. Raises DataError."""

    async def ask() -> ModelInfo:
        async with AsyncClient(server) as client:
            return await client.get_model(name, version, timeout_s=TIMEOUT_S)

    try:
        found = asyncio.run(ask())
    except ClassifierError as error:
        raise DataError(f"--server {server}: {error}") from None
    if found.state != "READY":
        raise DataError(
            f"--server {server}: {name} version {found.version} is {found.state}: {found.reason}"
        )
    return found


def predict_with_server(
    server: str, model: ModelInfo, samples: Sequence[Sample], progress: Progress
) -> Predictions:
    """Raises DataError if the server fails; a file that it can't decode is unreadable."""
    try:
        return asyncio.run(_predict(server, model, samples, progress))
    except ClassifierError as error:
        raise DataError(f"--server {server}: {error}") from None


async def _predict(
    server: str, model: ModelInfo, samples: Sequence[Sample], progress: Progress
) -> Predictions:
    started_s = time.perf_counter()
    top_k = min(TOP, model.top_k)
    classes, confidence = empty(len(samples), top_k)
    unreadable: dict[int, str] = {}
    done = 0
    rest = iter(range(len(samples)))

    async def work(client: AsyncClient) -> None:
        nonlocal done
        for index in rest:
            try:
                answer = await client.classify(
                    samples[index].path,
                    model=model.name,
                    version=model.version,
                    top_k=top_k,
                    timeout_s=TIMEOUT_S,
                )
            except InvalidInput as error:
                unreadable[index] = str(error)
            except OSError as error:
                unreadable[index] = f"can't be read: {error.strerror}"
            else:
                best = answer.results[0]
                classes[index] = [each.index for each in best]
                confidence[index] = np.float32(best[0].probability)
            done += 1
            progress(done)

    async with AsyncClient(server) as client:
        await asyncio.gather(*(work(client) for _ in range(min(CALLS, len(samples)))))
    return Predictions(
        source=f"{model.name} version {model.version} at {server}",
        classes=classes,
        confidence=confidence,
        unreadable=unreadable,
        seconds=time.perf_counter() - started_s,
    )
