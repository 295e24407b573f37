"""Failed calls are retried when that may help, within the deadline and the budget."""

import math
import random

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convserve_client import (
    AsyncClient,
    ClassifierError,
    DeadlineExceeded,
    ModelNotReady,
    Overloaded,
    RetryPolicy,
)
from convserve_client.retry import RetryBudget
from tests.support.scripted_classifier import (
    EXPECTED_ANSWER,
    ScriptedClassifier,
    answer,
    refuse,
    retry_info,
    serving,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class VirtualTime:
    """A clock that moves only when the client sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s


def retrying(target: str, time: VirtualTime, **policy: float) -> AsyncClient:
    return AsyncClient(
        target,
        retry=RetryPolicy(**policy),  # type: ignore[arg-type]
        clock=time,
        sleep=time.sleep,
        rng=random.Random(1),
    )


async def test_a_refused_call_is_retried_no_sooner_than_the_server_asks() -> None:
    refused = refuse(EXHAUSTED, "full", retry_info(1.5))
    service = ScriptedClassifier(refused, refused, answer)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        assert await client.classify(b"image", model="small") == EXPECTED_ANSWER
    assert len(service.requests) == 3
    assert service.requests[0] == service.requests[2]
    assert len(time.slept_s) == 2
    assert all(1.5 <= slept_s <= 1.5 + 2.0 for slept_s in time.slept_s)


async def test_pushback_metadata_sets_the_wait() -> None:
    refused = refuse(EXHAUSTED, "full", trailing=(("grpc-retry-pushback-ms", "2500"),))
    time = VirtualTime()
    async with (
        serving(ScriptedClassifier(refused, answer)) as target,
        retrying(target, time) as client,
    ):
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER
    assert time.slept_s[0] >= 2.5


async def test_the_longer_of_two_requested_waits_counts() -> None:
    refused = refuse(
        EXHAUSTED, "full", retry_info(3), trailing=(("grpc-retry-pushback-ms", "100"),)
    )
    time = VirtualTime()
    async with (
        serving(ScriptedClassifier(refused, answer)) as target,
        retrying(target, time) as client,
    ):
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER
    assert time.slept_s[0] >= 3


@pytest.mark.parametrize("pushback", ["-1", "soon", "1e3", ""])
async def test_a_server_that_forbids_retries_gets_none(pushback: str) -> None:
    refused = refuse(UNAVAILABLE, "leave", trailing=(("grpc-retry-pushback-ms", pushback),))
    service = ScriptedClassifier(refused)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(ModelNotReady) as failure:
            await client.classify(b"", model="small")
    assert failure.value.retry_after_s == math.inf
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_unavailable_is_retried_without_retry_info() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE), answer)
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        assert await client.classify(b"", model="small") == EXPECTED_ANSWER
    assert len(time.slept_s) == 1


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c not in (grpc.StatusCode.OK, UNAVAILABLE)]
)
async def test_no_other_status_is_retried(code: grpc.StatusCode) -> None:
    """This includes RESOURCE_EXHAUSTED: without a requested wait it may be a quota or a limit."""
    service = ScriptedClassifier(refuse(code))
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(ClassifierError):
            await client.classify(b"", model="small")
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_a_requested_wait_beyond_the_deadline_fails_at_once() -> None:
    service = ScriptedClassifier(refuse(EXHAUSTED, "full", retry_info(5.5)))
    time = VirtualTime()
    async with serving(service) as target, retrying(target, time) as client:
        with pytest.raises(Overloaded, match="full") as refused:
            await client.classify(b"", model="small", timeout_s=5)
    assert refused.value.retry_after_s == 5.5
    assert (len(service.requests), time.slept_s) == (1, [])


async def test_each_attempt_gets_only_the_remaining_time() -> None:
    refused = refuse(EXHAUSTED, "full", retry_info(3))
    service = ScriptedClassifier(refused, refused, answer)
    time = VirtualTime()
    async with (
        serving(service) as target,
        retrying(target, time, max_backoff_s=0.5) as client,
    ):
        await client.classify(b"", model="small", timeout_s=9)
    assert len(service.time_left_s) == 3
    for left_s, max_s in zip(service.time_left_s, (9, 6, 3), strict=True):
        assert left_s <= 1.01 * max_s  # gRPC rounds it up, by at most 1 %


async def test_retries_never_go_past_the_deadline() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    time = VirtualTime()
    async with (
        serving(service) as target,
        retrying(
            target, time, attempts=100, first_backoff_s=1, max_backoff_s=1, budget_burst=100
        ) as client,
    ):
        with pytest.raises(ModelNotReady):
            await client.classify(b"", model="small", timeout_s=7)
    assert 0 < sum(time.slept_s) < 7


async def test_a_call_makes_no_more_attempts_than_allowed() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    async with serving(service) as target, retrying(target, VirtualTime(), attempts=3) as client:
        with pytest.raises(ModelNotReady):
            await client.classify(b"", model="small")
    assert len(service.requests) == 3


async def test_retries_of_all_calls_stay_within_the_budget() -> None:
    service = ScriptedClassifier(refuse(UNAVAILABLE))
    async with (
        serving(service) as target,
        retrying(target, VirtualTime(), budget_burst=5, budget_ratio=0.1) as client,
    ):
        for _ in range(100):
            with pytest.raises(ModelNotReady):
                await client.classify(b"", model="small", timeout_s=1000)
    assert len(service.requests) == 100 + 5 + 10


@given(st.lists(st.booleans()), st.floats(0, 1), st.integers(0, 20))
def test_a_budget_never_allows_more_than_its_burst_and_its_ratio(
    wanted: list[bool], ratio: float, burst: int
) -> None:
    budget = RetryBudget(ratio, burst)
    retries = 0
    for calls, retry in enumerate(wanted, start=1):
        budget.add_call()
        retries += retry and budget.take_retry()
        assert retries <= burst + round(ratio, 3) * calls + 1e-9


@given(st.integers(1, 100), st.one_of(st.none(), st.floats(0, 1e6)), st.integers(0, 2**32))
def test_a_wait_is_at_least_the_requested_one_and_at_most_one_backoff_longer(
    attempt: int, retry_after_s: float | None, seed: int
) -> None:
    policy = RetryPolicy(attempts=100, first_backoff_s=0.1, max_backoff_s=5)
    wait_s = policy.wait_s(attempt, retry_after_s, random.Random(seed))
    ceiling_s = min(5, 0.1 * 2 ** (attempt - 1))
    assert (retry_after_s or 0) <= wait_s <= (retry_after_s or 0) + ceiling_s


def test_waits_cover_the_whole_backoff_range() -> None:
    rng = random.Random(1)
    waits = [
        RetryPolicy(first_backoff_s=1, max_backoff_s=1).wait_s(1, None, rng) for _ in range(500)
    ]
    assert min(waits) < 0.02
    assert max(waits) > 0.98


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first_backoff_s": 0},
        {"first_backoff_s": 3},
        {"max_backoff_s": math.inf},
        {"budget_ratio": 1.5},
        {"budget_burst": -1},
    ],
)
def test_an_invalid_retry_policy_is_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


async def test_time_spent_before_sending_counts_against_the_deadline(unused_target: str) -> None:
    time = VirtualTime()

    class SlowDisk:
        def __fspath__(self) -> str:
            time.now_s += 6
            return __file__

    async with retrying(unused_target, time) as client:
        with pytest.raises(DeadlineExceeded, match="before"):
            await client.classify(SlowDisk(), model="small", timeout_s=5)
