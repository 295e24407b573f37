"""The commands of docs/quickstart-own-model.md run as they stand, and end in what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from tests.docs.pages import BLOCK, ROOT

PAGE = ROOT / "docs/quickstart-own-model.md"
CARD = re.compile(r"Write `([\w.]+)`[^\n]*:\n\n```toml\n(.*?)```", flags=re.DOTALL)
TIMEOUT_S = 300  # of one command, and of one event of the server


class Terminal:
    """Runs the shell blocks of the page, in a folder that stands for a checkout.

    `python` is this Python, and `convserve` the command of this checkout. Its server takes
    free ports; after `reach`, `convserve classify` calls the server on that port.
    """

    def __init__(self, checkout: Path) -> None:
        (checkout / "docs").symlink_to(ROOT / "docs")
        commands = checkout / "bin"
        commands.mkdir()
        self._checkout = self.folder = checkout
        python = shlex.quote(sys.executable)
        self._write("python", f'exec {python} "$@"')
        self._write("convserve", f'exec {python} -m server.cli "$@"')
        self.environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'clients'}",
            "CONVSERVE_PORT": "0",
            "CONVSERVE_HTTP_PORT": "0",
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",  # waiting threads take time from other tests
        }

    def _write(self, command: str, script: str) -> None:
        path = self._checkout / "bin" / command
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def reach(self, port: int) -> None:
        """Makes `convserve classify` call this port in place of 8001."""
        python = shlex.quote(sys.executable)
        to = f'[ "$1" = classify ] && set -- "$@" --target 127.0.0.1:{port}'
        self._write("convserve", f'{to}\nexec {python} -m server.cli "$@"')

    def run(self, block: str) -> str:
        """What the block prints. The folder that it changes to stays for the next block."""
        ends_in = self._checkout / "ends_in"
        ran = subprocess.run(
            ["sh", "-e", "-c", f"{block}\npwd >{shlex.quote(str(ends_in))}"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert ran.returncode == 0, f"{block}{ran.stdout}{ran.stderr}"
        self.folder = Path(ends_in.read_text().strip())
        return ran.stdout + ran.stderr

    @contextmanager
    def serving(self, block: str) -> Iterator[Server]:
        """The server of the block. It ends with the context."""
        process = subprocess.Popen(
            f"exec {block}",
            shell=True,
            cwd=self.folder,
            env=self.environment | {"CONVSERVE_LOG_FORMAT": "json"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Server(process)
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


class Server:
    """A running server, followed by its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._seen: list[dict[str, Any]] = []

    def event(self, name: str) -> dict[str, Any]:
        """The first event of this name, past or future."""
        for line in self._seen:
            if line["event"] == name:
                return line
        assert self._process.stderr is not None
        timer = Timer(TIMEOUT_S, self._process.kill)  # the log then ends
        timer.start()
        try:
            for text in self._process.stderr:
                self._seen.append(json.loads(text))
                if self._seen[-1]["event"] == name:
                    return self._seen[-1]
        finally:
            timer.cancel()
        raise AssertionError(f"the log ended without {name}: {self._seen}")


def commands_of(page: str) -> list[str]:
    """The shell blocks of the page, in their order."""
    return [text for _, language, text in BLOCK.findall(page) if language == "sh"]


def top1_of(shown: str) -> float:
    """Top-1 of the tables that `convserve evaluate` prints, in percent."""
    found = re.search(r"top-1\W+([\d.]+)\s*%", shown)
    assert found is not None, shown
    return float(found[1])


def test_the_page_leads_from_a_training_to_a_better_version(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    folder, train, build, serve, classify, evaluate, better, again, compare = commands_of(page)
    terminal = Terminal(tmp_path)
    terminal.run(folder)
    assert "40 pictures each to train" in terminal.run(train)
    card = CARD.search(page)
    assert card is not None
    (terminal.folder / card[1]).write_text(card[2])
    taken = re.search(r"^digits: digits.pth: 122 tensors.*$", page, flags=re.MULTILINE)
    assert taken is not None
    assert taken[0] in terminal.run(build)

    with terminal.serving(serve) as server:
        server.event("version_loaded")
        terminal.reach(server.event("listening")["port"])
        answer = terminal.run(classify)
        assert "digits version 1" in answer
        assert "UNTRAINED" not in answer
        first = top1_of(terminal.run(evaluate))
        assert "<html" in (terminal.folder / "report.html").read_text(encoding="utf-8")

        terminal.run(better)
        assert server.event("version_switched")["to"] == 2
        answer = terminal.run(again)
        assert "digits version 2" in answer
        best = re.findall(r"val/(\w+)/040.png\W+1\W+(\w+)", answer)
        assert len(best) == 2
        assert any(truth == label for truth, label in best), "version 2 is rarely wrong"

    compared = terminal.run(compare)
    assert top1_of(compared) > max(first, 80)  # chance is 20 %; here 58.5, then 95
    assert "against digits version 1" in compared
