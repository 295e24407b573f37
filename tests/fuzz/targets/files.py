"""Files that people and tools write: manifests, serving.json, the auth file and cards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

import msgspec

from model_repo import cards
from server.repository.manifest import InvalidVersion, decode_manifest
from server.repository.serving_config import SERVING_CONFIG_FILE, read_serving_config
from server.security.identity.auth_file import InvalidAuthFile, parse_auth_file
from tests.fuzz.mutate import json_text, sometimes_mutated
from tests.fuzz.target import Feed, Target, parser
from tests.support.serving import publish

SERVING = {"versions": "latest:2", "labels": {"stable": 1, "canary": 2}, "canary_percent": 5}
VERSIONS = ("latest:1", "all", "named:1,2", "latest:0", "named:", "latest:99999999999999999999")
AUTH = b"""\
[proxy]
header = "x-user"
addresses = ["10.0.0.0/8", "::1"]

[principals.alice]
roles = ["classify", "observe"]
models = ["lenet*"]
certificates = ["CN:alice", "DNS:alice.example"]
proxy_users = ["alice"]

[[tokens]]
id = "aaaaaaaaaaaaaaaa"
principal = "alice"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
expires = 2030-01-01T00:00:00Z
"""
TOML_PARTS = (
    b"= 1\n", b'= "a"\n', b"= [1, 2]\n", b"= {}\n", b"[a]\n", b"[[a]]\n", b"= 1e400\n", b"= nan\n",
    b"= 2030-01-01\n", b"= 9223372036854775808\n", b'= """', b"\xff", b"= true\n", b'= ""\n',
    b"= -1\n",
)  # fmt: skip


@cache
def manifest() -> object:
    """A valid manifest."""
    with tempfile.TemporaryDirectory() as folder:
        return msgspec.to_builtins(publish(Path(folder)))


def make_manifest(draw: Random) -> bytes:
    return json_text(manifest(), draw)


def make_serving(draw: Random) -> bytes:
    return json_text({**SERVING, "versions": draw.choice(VERSIONS)}, draw)


def make_toml(text: bytes, draw: Random) -> bytes:
    """The text with a value, a line or some bytes changed."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw.choice((0, 1, 1, 2))):
        place = draw.randrange(len(lines))
        match draw.randrange(4):
            case 0:
                del lines[place : place + 1]
                lines = lines or [b"\n"]
            case 1:
                lines.insert(place, draw.choice(lines))
            case _:
                name = lines[place].partition(b"=")[0]
                lines[place] = name + draw.choice(TOML_PARTS)
    return sometimes_mutated(b"".join(lines), draw, 0.3)


def make_auth(draw: Random) -> bytes:
    return make_toml(AUTH, draw)


def make_card(draw: Random) -> bytes:
    name = draw.choice(("lenet5", "resnet50", "alexnet2012"))
    return make_toml(_card_text(name), draw)


@cache
def _card_text(name: str) -> bytes:
    return (cards.CARDS_FOLDER / f"{name}.toml").read_bytes()


@contextmanager
def card_files() -> Iterator[Feed]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzzed.toml")

        def feed(data: bytes) -> bool:
            path.write_bytes(data)
            try:
                cards.load("fuzzed", Path(folder))
            except cards.CardError:
                return False
            return True

        yield feed


@contextmanager
def serving_files() -> Iterator[Feed]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SERVING_CONFIG_FILE)

        def feed(data: bytes) -> bool:
            path.write_bytes(data)
            try:
                read_serving_config(Path(folder))
            except InvalidVersion:
                return False
            return True

        yield feed


TARGETS = (
    Target("manifests", make_manifest, parser(decode_manifest, InvalidVersion), 0.05),
    Target("serving-files", make_serving, serving_files, 0.03),
    Target("auth-files", make_auth, parser(parse_auth_file, InvalidAuthFile), 0.05),
    Target("cards", make_card, card_files, 0.02),
)
