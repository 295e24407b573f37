"""Heavy work is spread over the turns of the event loop."""

from __future__ import annotations

import asyncio

from server.api.turns import TURN_S, WorkTurns


async def test_other_work_runs_between_two_pieces() -> None:
    turns = WorkTurns()
    done: list[str] = []

    async def heavy(name: str) -> None:
        await turns.wait(TURN_S)
        done.append(name)

    async def light() -> None:
        while len(done) < 12:
            if done and done[-1] != "light":
                done.append("light")
            await asyncio.sleep(0)

    await asyncio.gather(light(), *(heavy(name) for name in "abcdef"))
    assert done[::2] == list("abcdef")
    assert set(done[1::2]) == {"light"}


async def test_short_pieces_share_a_turn() -> None:
    turns = WorkTurns()
    done: list[int] = []
    counts: list[int] = []

    async def heavy(number: int) -> None:
        await turns.wait(TURN_S / 8)
        done.append(number)

    tasks = [asyncio.create_task(heavy(number)) for number in range(32)]
    while len(done) < 32:
        counts.append(len(done))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert done == list(range(32))
    assert {after - before for before, after in zip(counts, counts[1:], strict=False)} <= {0, 8}


async def test_a_caller_that_leaves_holds_up_nobody() -> None:
    turns = WorkTurns()
    for _ in range(3):
        waiting = [asyncio.create_task(turns.wait(TURN_S)) for _ in range(6)]
        await asyncio.sleep(0)
        for one in waiting[::2]:
            one.cancel()
        async with asyncio.timeout(20):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[1::2] == [None] * 3
