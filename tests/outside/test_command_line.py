"""h2load, nghttp and curl."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from server.api.stubs import classify_pb2 as pb
from tests.outside.conftest import Digit, Service
from tests.outside.tools import needs, output
from tests.support.http2_frames import message
from tests.transport.attacks.attack import CLASSIFY, DIGIT

GRPC = ("-H", "content-type: application/grpc", "-H", "te: trailers")


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A file with the body of a Classify call."""
    path = tmp_path / "body"
    path.write_bytes(message(DIGIT))
    return path


@needs("h2load")
@pytest.mark.parametrize(("connections", "streams"), [(1, 1), (8, 32), (50, 10)])
def test_h2load_loses_no_call(service: Service, body: Path, connections: int, streams: int) -> None:
    calls = 2_000
    load = (f"-n{calls}", f"-c{connections}", f"-m{streams}", "-d", body)
    shown = output("h2load", *load, *GRPC, *service.authorization, service.grpc + CLASSIFY)
    assert f"{calls} done, {calls} succeeded, 0 failed, 0 errored, 0 timeout" in shown
    assert f"status codes: {calls} 2xx" in shown


@needs("nghttp")
def test_nghttp_shows_the_response_and_its_trailers(service: Service, body: Path) -> None:
    call = (*GRPC, *service.authorization, service.grpc + CLASSIFY)
    shown = output("nghttp", "-nv", "--no-verify-peer", "-d", body, *call)
    received = re.findall(
        r"recv \(stream_id=\d+\) ([\w:-]+: .*)", re.sub(r"\x1b\[[\d;]*m", "", shown)
    )
    assert ":status: 200" in received
    assert "content-type: application/grpc" in received
    assert "grpc-status: 0" in received


@needs("curl")
def test_curl_classifies_a_file(service: Service, digit: Digit) -> None:
    curl = ("curl", "-sf", *service.trust, *service.authorization)
    assert output(*curl, f"{service.http}/healthz")
    url = f"{service.http}/v1/models/lenet5:classify"
    for form in (("--data-binary", f"@{digit.path}"), ("-F", f"image=@{digit.path}")):
        answer = json.loads(output(*curl, *form, url))
        assert answer["classes"][0]["index"] == digit.label


@needs("curl")
def test_curl_calls_grpc_with_prior_knowledge(service: Service, body: Path, tmp_path: Path) -> None:
    url = service.grpc + CLASSIFY
    answer = tmp_path / "answer"
    shown = output(
        "curl", "-s", "--http2-prior-knowledge", *service.trust, *service.authorization, *GRPC,
        "--data-binary", f"@{body}", "-o", answer, "-D-", url,
    )  # fmt: skip
    assert "grpc-status: 0" in shown
    assert pb.ClassifyResponse.FromString(answer.read_bytes()[5:]).model == "lenet5"


@needs("curl")
def test_curl_learns_which_port_speaks_what(plain: Service) -> None:
    """HTTP/1.1 at the gRPC port, and HTTP/2 at the HTTP port."""
    shown = output("curl", "-s", "-w", "%{http_code}", f"{plain.grpc}/healthz")
    assert "This port speaks gRPC" in shown
    assert shown.endswith("505")
    written = "%{http_code} %{http_version}"
    shown = output("curl", "-s", "--http2", "-w", written, f"{plain.http}/healthz")
    assert shown.endswith("200 1.1")  # the offer of an upgrade is ignored


@needs("curl")
def test_curl_without_a_token_is_told_what_is_missing(guarded: Service, digit: Digit) -> None:
    url = f"{guarded.http}/v1/models/lenet5:classify"
    sent = ("--data-binary", f"@{digit.path}")
    shown = output("curl", "-s", *guarded.trust, "-D-", *sent, url)
    assert shown.startswith("HTTP/1.1 401")
    assert "www-authenticate: Bearer" in shown
    assert output("curl", "-sf", *guarded.trust, f"{guarded.http}/healthz")


@needs("curl")
def test_curl_that_does_not_trust_the_certificate_says_so(guarded: Service) -> None:
    ended = subprocess.run(
        ["curl", "-sS", f"{guarded.http}/healthz"], capture_output=True, text=True
    )
    assert "certificate" in ended.stderr
