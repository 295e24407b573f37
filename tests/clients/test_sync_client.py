"""The blocking client does what the asyncio client does, for threads."""

import asyncio
import threading

import grpc
import pytest

from convserve_client import (
    NO_RETRY,
    Answer,
    ClassifierError,
    Client,
    EngineFailure,
    ServerUnreachable,
)
from tests.support.scripted_classifier import (
    EXPECTED_ANSWER,
    ScriptedClassifier,
    Silence,
    refuse,
    serving,
)


async def test_many_threads_may_share_one_sync_client() -> None:
    service = ScriptedClassifier()
    async with serving(service) as target:

        def ask_from_threads() -> list[Answer]:
            answers: list[Answer] = []
            with Client(target) as client:

                def ask() -> None:
                    for _ in range(10):
                        answers.append(client.classify(b"", model="small"))

                threads = [threading.Thread(target=ask) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert client.get_model("small").labels == ("cat", "dog")
            return answers

        assert await asyncio.to_thread(ask_from_threads) == [EXPECTED_ANSWER] * 40
    assert len(service.requests) == 40


async def test_the_sync_client_raises_the_same_errors() -> None:
    service = ScriptedClassifier(refuse(grpc.StatusCode.INTERNAL, "internal error"))
    async with serving(service) as target:

        def ask() -> None:
            with Client(target) as client:
                client.classify(b"", model="small")

        with pytest.raises(EngineFailure, match="internal error"):
            await asyncio.to_thread(ask)


async def test_the_sync_client_works_while_an_event_loop_is_running(unused_target: str) -> None:
    with Client(unused_target, retry=NO_RETRY) as client, pytest.raises(ServerUnreachable):
        client.list_models()


async def test_closing_the_sync_client_ends_its_calls_and_its_thread() -> None:
    silence = Silence()
    async with serving(ScriptedClassifier(silence)) as target:
        client = Client(target)
        call = asyncio.create_task(asyncio.to_thread(client.classify, b"", model="small"))
        await silence.entered.wait()
        await asyncio.to_thread(client.close)
        with pytest.raises(ClassifierError, match="closed"):
            await call
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.list_models()
    assert not any(thread.name == "classifier-client" for thread in threading.enumerate())
