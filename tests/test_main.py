"""`python -m server` as a process: signals, exit status and log."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from PIL import Image

from server.api.stubs import classify_pb2 as pb
from tests.support.server_process import (
    CLASSIFY,
    code_for_new_client,
    get,
    next_event,
    server_process,
    wait_until_not_ready,
)
from tests.support.serving import publish


async def test_a_server_stops_gracefully_when_its_terminal_closes(tmp_path: Path) -> None:
    publish(tmp_path)
    async with server_process("--repo", str(tmp_path)) as server:
        await next_event(server, "version_loaded")
        server.send_signal(signal.SIGHUP)
        assert (await next_event(server, "stopping"))["signal"] == "SIGHUP"
        assert await server.wait() == 0


async def test_a_server_without_standard_files_exits_with_its_own_status(tmp_path: Path) -> None:
    """Otherwise new files would get the numbers 0 to 2, and libuv aborts when it closes those."""
    command = f"exec {sys.executable} -m server --repo {tmp_path / 'nowhere'} <&- >&- 2>&-"
    ended = await asyncio.create_subprocess_shell(command)
    assert await ended.wait() == 1


async def test_sigterm_lets_accepted_requests_finish_and_exits_with_status_0(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    file = BytesIO()
    Image.linear_gradient("L").resize((3000, 2000)).convert("RGB").save(file, "JPEG")
    slow = pb.ClassifyRequest(model="tiny", images=[pb.Image(encoded=file.getvalue())] * 24)
    arguments = ("--repo", str(tmp_path), "--decode-threads=1", "--grace-s=60")
    async with server_process(*arguments, CONVSERVE_LOG_LEVEL="debug") as server:
        listening = await next_event(server, "listening")
        await next_event(server, "version_loaded")
        target, http = (f"127.0.0.1:{listening[name]}" for name in ("port", "http_port"))
        async with grpc.aio.insecure_channel(target) as channel:
            unary: Any = channel.unary_unary
            call = unary(CLASSIFY)(slow.SerializeToString(), timeout=90)
            while 'queue_rows{model="tiny"} 24' not in (await get(f"http://{http}/metrics")).text:
                assert not call.done(), (
                    "the request ended before the metrics showed its images in the queue"
                )
            server.send_signal(signal.SIGTERM)
            assert (await next_event(server, "stopping"))["signal"] == "SIGTERM"
            assert (await wait_until_not_ready(f"http://{http}"))["accepting"] is False
            assert await code_for_new_client(target) == StatusCode.UNAVAILABLE
            response = pb.ClassifyResponse.FromString(await call)
        assert len(response.results) == 24
        await next_event(server, "stopped")
        assert await server.wait() == 0


@pytest.mark.parametrize("utf8", ["0", "1"])
async def test_a_repository_with_blanks_and_umlauts_is_served_in_the_c_locale(
    tmp_path: Path, utf8: str
) -> None:
    """Without UTF-8 mode, Python can't pass the path to the file watch. It polls then."""
    repo = tmp_path / "größe und mehr"
    publish(repo)
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": utf8, "PYTHONUTF8": utf8}
    async with server_process("--repo", str(repo), **locale) as server:
        port = (await next_event(server, "listening"))["http_port"]
        await next_event(server, "version_loaded")
        if utf8 == "0":
            await next_event(server, "watch_fell_back_to_polling")
        assert (await get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 0


async def test_an_interrupt_while_models_load_exits_with_status_0(tmp_path: Path) -> None:
    publish(tmp_path)
    async with server_process("--repo", str(tmp_path)) as server:
        await next_event(server, "listening")
        server.send_signal(signal.SIGINT)
        await next_event(server, "stopped")
        assert await server.wait() == 0


HANGING = """
import sys, threading
from server import __main__
from server.models.loader import EngineLoader

EngineLoader.load = lambda *_: threading.Event().wait()
sys.exit(__main__.main())
"""


async def test_a_server_exits_even_if_loading_a_model_hangs(tmp_path: Path) -> None:
    publish(tmp_path)
    async with server_process("--repo", str(tmp_path), run=("-c", HANGING)) as server:
        await next_event(server, "listening")
        server.send_signal(signal.SIGTERM)
        await next_event(server, "stopping")
        await next_event(server, "load_still_running_at_exit")
        await next_event(server, "stopped")
        assert await server.wait() == 0


async def test_a_server_that_cannot_serve_logs_one_line_and_exits_with_status_1(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    (tmp_path / "tiny/1/manifest.json").write_text("{}")
    async with server_process(CONVSERVE_REPO=str(tmp_path)) as server:
        _, text = await server.communicate()
    lines = [json.loads(line) for line in text.splitlines()]
    assert server.returncode == 1
    assert [line["event"] for line in lines] == ["listening", "version_failed", "cannot_serve"]
    assert lines[-1]["reason"].startswith("no model could be loaded: tiny version 1: ")


async def test_an_invalid_option_exits_with_status_2() -> None:
    async with server_process("--port=many") as server:
        _, text = await server.communicate()
    assert server.returncode == 2
    assert "argument --port: invalid int value: 'many'" in text.decode()
