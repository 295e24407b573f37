"""Worker pool: several processes that send one load together, because one uses only one core.

With one worker there is no further process: the calling process sends the load itself.
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

from convserve_client.loadgen.event_loop import clock, run_loop
from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.run import Progress, Run
from convserve_client.loadgen.worker import WorkerResult, run_worker

PROGRESS_INTERVAL_S = 0.25
START_DELAY_S = 0.1  # so that every process knows the start time before the run starts

ShowProgress = Callable[[float, Progress], None]  # gets the run's time and the new progress


class WorkerDied(Exception):
    """A worker process ended unexpectedly. The message has its exit status."""


async def run_workers(
    plan: Plan,
    *,
    on_start: Callable[[float], None],
    show_progress: ShowProgress,
    stop: asyncio.Event,
) -> list[WorkerResult]:
    """Sends the plan's load from as many processes as it says.

    `on_start` gets the run's start on `clock`; `show_progress` is called several times a second.
    Ends early, with partial results, when `stop` is set. Raises what `run_worker` raises, and
    WorkerDied.
    """
    if plan.processes == 1:
        return [await _run_here(plan, on_start, show_progress, stop)]
    async with _worker_processes(plan) as workers:
        await asyncio.gather(*(worker.expect("ready") for worker in workers))
        zero_s = clock() + START_DELAY_S
        for worker in workers:
            worker.send(zero_s)
        on_start(zero_s)
        stopping = asyncio.create_task(_forward_stop(stop, workers))
        showing = asyncio.create_task(
            _report_progress(
                show_progress, zero_s, lambda: [worker.progress() for worker in workers]
            )
        )
        try:
            return list(await asyncio.gather(*(worker.expect("result") for worker in workers)))
        finally:
            await _cancel(stopping, showing)


async def _run_here(
    plan: Plan,
    on_start: Callable[[float], None],
    show_progress: ShowProgress,
    stop: asyncio.Event,
) -> WorkerResult:
    tasks: list[asyncio.Task[None]] = []

    async def wait_for_start() -> float:
        zero_s = clock() + START_DELAY_S
        on_start(zero_s)
        return zero_s

    def on_run(run: Run) -> None:
        zero_s = clock() - run.now_s()
        showing = _report_progress(show_progress, zero_s, lambda: [run.progress()])
        tasks.append(asyncio.create_task(showing))

    try:
        return await run_worker(plan, 0, 1, wait_for_start=wait_for_start, on_run=on_run, stop=stop)
    finally:
        await _cancel(*tasks)


async def _report_progress(
    show_progress: ShowProgress, zero_s: float, read: Callable[[], list[Progress]]
) -> None:
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_S)
        total = Progress()
        for progress in read():
            total.add(progress)
        show_progress(clock() - zero_s, total)


async def _forward_stop(stop: asyncio.Event, workers: list[_WorkerProcess]) -> None:
    await stop.wait()
    for worker in workers:
        worker.send("stop")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _WorkerProcess:
    """A worker process, seen from the parent. It sends messages (name, value).

    A thread reads them: event loops need pipes that never block, and long messages block.
    """

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self._messages: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._progress = Progress()
        self._reader = _read_in_thread(connection, self._receive)

    def send(self, message: float | str) -> None:
        """Sends the time to start at, or "stop"."""
        with suppress(OSError):  # the process has died; `expect` raises WorkerDied
            self._connection.send(message)

    async def expect(self, wanted: str) -> Any:
        """Value of the next message that is not progress. Raises the worker's error."""
        name, value = await self._messages.get()
        if name == "error":
            raise value
        assert name == wanted, name
        return value

    def progress(self) -> Progress:
        found, self._progress = self._progress, Progress(in_flight=self._progress.in_flight)
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._reader.join()  # ends with the pipe
        self._connection.close()

    def _receive(self, message: Any) -> None:
        if message is None:
            self._process.join(1)
            died = WorkerDied(f"a worker process ended with status {self._process.exitcode}")
            self._messages.put_nowait(("error", died))
            return
        name, value = message
        if name == "progress":
            self._progress.in_flight = 0
            self._progress.add(value)
        else:
            self._messages.put_nowait((name, value))


def _read_in_thread(connection: Connection, receive: Callable[[Any], None]) -> threading.Thread:
    """Passes each message of the connection to the event loop; None means its end."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        message: Any = True
        while message is not None:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                message = None
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(receive, message)

    thread = threading.Thread(target=read, name="worker messages", daemon=True)
    thread.start()
    return thread


@asynccontextmanager
async def _worker_processes(plan: Plan) -> AsyncIterator[list[_WorkerProcess]]:
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    workers: list[_WorkerProcess] = []
    try:
        with _ignored_interrupts():  # Ctrl-C must stop the workers through this process
            for index in range(plan.processes):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_worker_main,
                    args=(plan, index, theirs),
                    name=f"worker {index}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                workers.append(_WorkerProcess(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.close()


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Processes started inside ignore SIGINT from their first instruction on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker_main(plan: Plan, index: int, connection: Connection) -> None:
    try:
        run_loop(_run_as_worker(plan, index, connection))
    except Exception as error:
        connection.send(("error", error))


async def _run_as_worker(plan: Plan, index: int, connection: Connection) -> None:
    stop = asyncio.Event()
    zero_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def receive(message: float | str | None) -> None:
        if isinstance(message, float):
            zero_s.set_result(message)
        else:  # "stop", or None because the parent has died
            stop.set()

    _read_in_thread(connection, receive)
    tasks: list[asyncio.Task[None]] = []

    async def wait_for_start() -> float:
        connection.send(("ready", None))
        return await zero_s

    def on_run(run: Run) -> None:
        tasks.append(asyncio.create_task(_send_progress(run, connection)))

    result = await run_worker(
        plan,
        index,
        plan.processes,
        wait_for_start=_or_stopped(wait_for_start, stop),
        on_run=on_run,
        stop=stop,
    )
    await _cancel(*tasks)
    connection.send(("result", result))


def _or_stopped(wait_for_start: Callable[[], Awaitable[float]], stop: asyncio.Event) -> Any:
    """`wait_for_start` that also returns when `stop` is set, for example if the parent died."""

    async def either() -> float:
        started = asyncio.ensure_future(wait_for_start())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not started.done():
            started.cancel()
            return clock()
        return started.result()

    return either


async def _send_progress(run: Run, connection: Connection) -> None:
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_S)
        connection.send(("progress", run.progress()))
