"""Tokens travel in the metadata, encrypted unless the caller allows otherwise, and stay secret."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from convserve_client import (
    AsyncClient,
    ClassifierError,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    TlsOptions,
    Unauthenticated,
    classify,
)
from convserve_client.security.token import is_local
from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import (
    ANSWER,
    Context,
    ScriptedClassifier,
    answer,
    refuse,
    retry_info,
    serving,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def authorization(context: Context) -> list[Any]:
    return [value for key, value in context.invocation_metadata() or () if key == "authorization"]


class Listening(ScriptedClassifier):
    """Notes the credentials of its calls."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.heard: list[Any] = []

    async def note(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        self.heard += authorization(context)
        return ANSWER


async def test_a_token_travels_with_every_call() -> None:
    service = Listening()
    tokens = iter(["first", "second"])
    async with serving(service) as target:
        async with AsyncClient(target, token="cs_me_123") as client:
            await client.classify(b"", model="small")
        async with AsyncClient(target, token=lambda: next(tokens)) as client:
            await client.classify(b"", model="small")
            await client.classify(b"", model="small")
    assert service.heard == ["Bearer cs_me_123", "Bearer first", "Bearer second"]


@pytest.mark.parametrize("target", ["example.org:8001", "10.0.0.1:8001", "[2001:db8::1]:8001"])
def test_a_token_does_not_cross_the_network_in_plaintext(target: str) -> None:
    with pytest.raises(ValueError, match="unencrypted: use TLS") as refused:
        AsyncClient(target, token="secret")
    assert "secret" not in str(refused.value)
    AsyncClient(target, token="secret", tls=TlsOptions())
    AsyncClient(target, token="secret", allow_plaintext_token=True)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:8001", True),
        ("127.9.9.9:8001", True),
        ("localhost:8001", True),
        ("[::1]:8001", True),
        ("unix:/run/convserve.sock", True),
        ("dns:///localhost:8001", True),
        ("ipv4:127.0.0.1:8001", True),
        ("dns:///example.org:8001", False),
        ("dns://127.0.0.1/example.org:8001", False),
        ("ipv4:127.0.0.1:8001,10.0.0.1:8001", False),
        ("localhost.example.org:8001", False),
        ("127.0.0.1.example.org:8001", False),
        ("xds:///localhost", False),
        ("0.0.0.0:8001", False),
    ],
)
def test_only_this_machine_counts_as_local(target: str, local: bool) -> None:
    assert is_local(target) is local


@pytest.mark.parametrize(
    "token", ["", "two words", "Bearer abc", "line\n", "ü", '"quoted"', "a\0b"]
)
def test_a_token_with_other_characters_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ValueError, match="characters that no token may have") as refused:
        AsyncClient("127.0.0.1:1", token=token)
    assert not token or token not in str(refused.value)


async def test_refused_credentials_are_not_sent_again() -> None:
    for code, error_class in (
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
    ):
        service = ScriptedClassifier(refuse(code, "needs the role classify"), answer)
        async with serving(service) as target, AsyncClient(target) as client:
            with pytest.raises(error_class, match="needs the role classify"):
                await client.classify(b"", model="small")
        assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("refusal", "error_class"), [("quota", QuotaExceeded), ("overloaded", Overloaded)]
)
async def test_a_used_up_quota_is_not_an_overloaded_server(
    refusal: str, error_class: type[ClassifierError]
) -> None:
    word = (("convserve-refusal", refusal),)
    forever = refuse(EXHAUSTED, "no", trailing=word)
    later = refuse(EXHAUSTED, "no", retry_info(0.01), trailing=word)
    service = ScriptedClassifier(later, forever)
    async with serving(service) as target, AsyncClient(target) as client:
        with pytest.raises(ClassifierError) as refused:
            await client.classify(b"", model="small")
    assert type(refused.value) is error_class
    assert len(service.requests) == 2, "sent again only where the server says when"


async def test_the_command_reads_its_token_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, token = tmp_path / "pet.jpg", tmp_path / "token"
    image.write_bytes(b"image")
    token.write_text("from-file\n")
    service = Listening()
    async with serving(service) as target:
        command = [str(image), "--target", target, "--json"]
        monkeypatch.setenv("CONVSERVE_TOKEN", "from-environment")
        assert await asyncio.to_thread(classify.main, command) == 0
        assert await asyncio.to_thread(classify.main, [*command, "--token-file", str(token)]) == 0
    assert service.heard == ["Bearer from-environment", "Bearer from-file"]
    assert "from-" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target=example.org:8001"], "unencrypted: use TLS"),
        (["--token-file=/nowhere/token"], "--token-file /nowhere/token cannot be read"),
        (["--tls-ca=/nowhere/ca.pem"], "/nowhere/ca.pem cannot be read"),
        (["--tls-cert=/nowhere/cert.pem"], "--tls-cert needs --tls-key"),
    ],
)
def test_the_command_says_what_is_wrong_with_tls_or_token(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CONVSERVE_TOKEN", "secret-token")
    with pytest.raises(SystemExit) as ended:
        classify.main(["pet.jpg", *arguments])
    assert ended.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert said in message
    assert "secret-token" not in message
