"""A server whose log is not read keeps serving, and stops on a signal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from tests.support.server_process import ROOT, get
from tests.support.serving import publish


def fill(pipe: int) -> None:
    """Writes into a pipe until a further byte would have to wait."""
    os.set_blocking(pipe, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(pipe, b"x" * size)
        except BlockingIOError:
            pass
    os.set_blocking(pipe, True)


async def test_a_full_log_pipe_blocks_neither_requests_nor_shutdown(tmp_path: Path) -> None:
    repo = tmp_path / "repository"
    publish(repo)
    reader, pipe = os.pipe()
    options = ("--host=127.0.0.1", "--port=0", "--http-port=0", "--log-format=json")
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "--repo", repo, *options),
        cwd=ROOT,
        env={},
        stderr=pipe,
    )
    try:
        async with asyncio.timeout(60):
            with open(reader, closefd=False) as lines:
                port = json.loads(await asyncio.to_thread(lines.readline))["http_port"]
            fill(pipe)
            for number in range(3):  # each is a line in the log
                (repo / f"Not A Model {number}").mkdir()
            publish(repo)
            http = f"http://127.0.0.1:{port}"
            while (
                'convserve_model_ready{model="tiny",version="2"} 1'
                not in (await get(http + "/metrics")).text
            ):
                assert (await get(http + "/healthz")).status_code == 200
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
        for end in (reader, pipe):
            os.close(end)
