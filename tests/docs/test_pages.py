"""README and docs/: size, links, and names of modules, commands and options."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from server.cli import COMMANDS
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands, name_of

MAX_README_LINES = 150
CURRENT_PAGES = [page for page in PAGES if page.stem != "CHANGELOG"]  # it has former names too
PATH = re.compile(r"`((?:server|model_repo|clients|deploy|tests|proto|docs)/[\w./-]*[\w/])`")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes for headings."""
    headings = re.findall(r"^#+ (.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def test_the_readme_starts_with_how_to_try_it_and_how_to_test_it() -> None:
    first = [command for page, command in commands() if page == "README.md"][:2]
    assert [command.split("#")[0].strip() for command in first] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_is_linked(page: Path) -> None:
    if page != ROOT / "README.md":
        linked = {
            (other.parent / target.partition("#")[0]).resolve()
            for other in PAGES
            if other != page
            for target in re.findall(r"\]\(([^)\s]+)\)", read(other))
        }
        assert page.resolve() in linked


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    for path in PATH.findall(read(page)):
        assert (ROOT / path).exists() or path.startswith("model_repo/engines"), path


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name_of)
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    code = re.findall(r"`[^`\n]+`|^```.*?^```", read(page), flags=re.DOTALL | re.MULTILINE)
    for target in {target for text in code for target in re.findall(r"\bmake ([a-z-]+)", text)}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name_of)
def test_every_module_and_script_that_is_run_exists(page: Path) -> None:
    for module in re.findall(r"python -m ([a-z]\w*(?:\.\w+)*)", read(page)):
        assert find_spec(module), module
    for script in re.findall(r"python ((?:\w+/)+\w+\.py)", read(page)):
        assert (ROOT / script).is_file(), script


def test_every_test_that_is_named_exists() -> None:
    text = read(ROOT / "docs/contributing.md")
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("name", ["docs/operations.md", "docs/gpu.md"])
def test_every_log_event_that_is_named_exists(name: str) -> None:
    server = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    for text in re.findall(r"log events? ((?:`\w+`(?: and )?)+)", read(ROOT / name)):
        for event in re.findall(r"`(\w+)`", text):
            assert f'"{event}"' in server, event


@cache
def help_of(program: tuple[str, ...]) -> str:
    run = [sys.executable, *program, "--help"]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def program_of(words: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
    """The program that a command runs, as arguments of python, and the rest of the command."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["convserve", command, *rest]:
            assert command in COMMANDS, command
            return ("-m", COMMANDS[command].module.removesuffix(".__main__")), rest
        case ["python", "-m", module, *rest] if not module.startswith("tests."):
            return ("-m", module), rest
        case ["python", script, *rest] if script.startswith("clients/"):
            return (script,), rest
    return None


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_option_that_is_used_exists(page: str, command: str) -> None:
    found = program_of(shlex.split(command, comments=True))
    if found is None:
        return
    program, rest = found
    subcommands = [word for word in rest if word in ("list", "verify", "gc", "label")]
    if program[-1] == "server.repository":
        program = (*program, *subcommands[:1])
    text = help_of(program) + (help_of(program[:2]) if subcommands else "")
    for option in (word.split("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}\b(?!-)", text), f"{page}: {command}"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_every_python_block_is_valid_and_imports_existing_names(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.page}: {node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)


def test_the_picture_is_up_to_date() -> None:
    drawing = runpy.run_path(str(ROOT / "docs/images/draw.py"))
    assert (ROOT / "docs/images/architecture.svg").read_text() == drawing["draw"]()
