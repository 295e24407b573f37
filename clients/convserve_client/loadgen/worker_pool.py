"""Several processes that send one load together: one is bound to a core, and gRPC to its lock.

With one there is no further process; the measuring one sends itself.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from convserve_client.loadgen.calls import clock
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.worker import (
    Part,
    Progress,
    Run,
    send_part,
)

PROGRESS_S = 0.25
AHEAD_S = 0.1  # from the word to the start: by then every process has heard it and is waiting

Showing = Callable[[float, Progress], None]  # told the run's time and what is new


class SenderDied(Exception):
    """A process that was to send has ended; the message says with which status."""


async def send(
    plan: Plan, *, started: Callable[[float], None], show: Showing, stop: asyncio.Event
) -> list[Part]:
    """Sends the plan's load from as many processes as it asks for.

    `started` is told the moment on `clock` that is the run's 0; `show` is told of the progress some
    times a second. Ends early, with what there is, once `stop` is set. Raises what `send_part`
    does, and SenderDied.
    """
    if plan.processes == 1:
        return [await _send_here(plan, started, show, stop)]
    async with _children(plan) as children:
        await asyncio.gather(*(child.expect("ready") for child in children))
        zero_s = clock() + AHEAD_S
        for child in children:
            child.tell(zero_s)
        started(zero_s)
        stopping = asyncio.create_task(_pass_on(stop, children))
        showing = asyncio.create_task(
            _shown(show, zero_s, lambda: [child.progress() for child in children])
        )
        try:
            return list(await asyncio.gather(*(child.expect("part") for child in children)))
        finally:
            await _ended(stopping, showing)


async def _send_here(
    plan: Plan, started: Callable[[float], None], show: Showing, stop: asyncio.Event
) -> Part:
    showing: list[asyncio.Task[None]] = []

    async def start() -> float:
        zero_s = clock() + AHEAD_S
        started(zero_s)
        return zero_s

    def running(run: Run) -> None:
        zero_s = clock() - run.now_s()
        showing.append(asyncio.create_task(_shown(show, zero_s, lambda: [run.progress()])))

    try:
        return await send_part(plan, 0, 1, start=start, running=running, stop=stop)
    finally:
        await _ended(*showing)


async def _shown(show: Showing, zero_s: float, read: Callable[[], list[Progress]]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        whole = Progress()
        for part in read():
            whole.add(part)
        show(clock() - zero_s, whole)


async def _pass_on(stop: asyncio.Event, children: list[_Child]) -> None:
    await stop.wait()
    for child in children:
        child.tell("stop")


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Child:
    """A process that sends, seen from here. Its words are (what, value) pairs.

    They are read on a thread: event loops want pipes that never block, and long words do.
    """

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self._heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._progress = Progress()
        self._listening = _listening(connection, self._hear)

    def tell(self, word: float | str) -> None:
        """A number is the moment to start at, any text the word to stop."""
        with suppress(OSError):  # it has gone; whoever expects something of it is told
            self._connection.send(word)

    async def expect(self, wanted: str) -> Any:
        """The value of the next word that is no progress. Raises the error that it had."""
        what, value = await self._heard.get()
        if what == "error":
            raise value
        assert what == wanted, what
        return value

    def progress(self) -> Progress:
        found, self._progress = self._progress, Progress(in_flight=self._progress.in_flight)
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._listening.join()  # its pipe has ended
        self._connection.close()

    def _hear(self, word: Any) -> None:
        if word is None:
            self._process.join(1)
            died = SenderDied(f"a sending process ended with status {self._process.exitcode}")
            self._heard.put_nowait(("error", died))
            return
        what, value = word
        if what == "progress":
            self._progress.in_flight = 0
            self._progress.add(value)
        else:
            self._heard.put_nowait((what, value))


def _listening(connection: Connection, hear: Callable[[Any], None]) -> threading.Thread:
    """A thread that has the event loop hear each word of the connection, at its end None."""
    loop = asyncio.get_running_loop()

    def listen() -> None:
        word: Any = True
        while word is not None:
            try:
                word = connection.recv()
            except (EOFError, OSError):
                word = None
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(hear, word)

    thread = threading.Thread(target=listen, name="words of a sender", daemon=True)
    thread.start()
    return thread


@asynccontextmanager
async def _children(plan: Plan) -> AsyncIterator[list[_Child]]:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    children: list[_Child] = []
    try:
        with _no_interrupts():  # a key pressed stops the whole by way of this process
            for index in range(plan.processes):
                here, there = context.Pipe()
                process = context.Process(
                    target=_child, args=(plan, index, there), name=f"sender {index}", daemon=True
                )
                process.start()
                there.close()
                children.append(_Child(process, here))
        yield children
    finally:
        for child in children:
            child.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started within pass over SIGINT from their first instruction on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _child(plan: Plan, index: int, connection: Connection) -> None:
    from convserve_client.loadgen.event_loop import run_loop

    try:
        run_loop(_serve(plan, index, connection))
    except Exception as error:
        connection.send(("error", error))


async def _serve(plan: Plan, index: int, connection: Connection) -> None:
    stop = asyncio.Event()
    zero_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def hear(word: float | str | None) -> None:
        if isinstance(word, float):
            zero_s.set_result(word)
        else:  # the word to stop; or nobody is there any more to tell
            stop.set()

    _listening(connection, hear)
    showing: list[asyncio.Task[None]] = []

    async def start() -> float:
        connection.send(("ready", None))
        return await zero_s

    def running(run: Run) -> None:
        showing.append(asyncio.create_task(_told(run, connection)))

    part = await send_part(
        plan, index, plan.processes, start=_or_stopped(start, stop), running=running, stop=stop
    )
    await _ended(*showing)
    connection.send(("part", part))


def _or_stopped(start: Callable[[], Awaitable[float]], stop: asyncio.Event) -> Any:
    """`start`, which also ends when there is nobody left to say it."""

    async def either() -> float:
        begun = asyncio.ensure_future(start())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({begun, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not begun.done():
            begun.cancel()
            return clock()
        return begun.result()

    return either


async def _told(run: Run, connection: Connection) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        connection.send(("progress", run.progress()))
