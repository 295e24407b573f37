"""The client's TLS, tokens and errors fit those of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convserve_client import (
    NO_RETRY,
    AsyncClient,
    ModelNotFound,
    PermissionDenied,
    QuotaExceeded,
    ServerUnreachable,
    Unauthenticated,
)
from convserve_client.loadgen.measure import measure
from convserve_client.loadgen.plan import RequestClass
from convserve_client.loadgen.server_metrics import fetch
from convserve_client.security.access import Access
from tests.clients.loadgen.plans import make_plan
from tests.clients.security.certificates import Authority, client_tls
from tests.security.credentials import OBSERVER, TEAM_A, token_lines
from tests.support.serving import SHAPE, Mirrors, Served, loading, publish, serve

PRINCIPALS = f"""
[principals.team]
roles = ["classify"]
models = ["tiny"]
images_per_s = 0.01
burst = 3

[principals.watcher]
roles = ["classify", "observe"]
certificates = ["CN:watcher"]

{token_lines("team", TEAM_A)}
{token_lines("watcher", OBSERVER)}
"""
TINY = (RequestClass(model="tiny", deadline_ms=5000),)
IMAGE = np.zeros((1, *SHAPE), np.uint8)


@asynccontextmanager
async def guarded_server(folder: Path, authority: Authority) -> AsyncIterator[Served]:
    """convserve with TLS, an auth file, and certificates of clients if they have one."""
    publish(folder / "repo")
    auth = folder / "auth.toml"
    auth.write_text(PRINCIPALS)
    auth.chmod(0o600)
    files = authority.issue("127.0.0.1")
    Path(files.key).chmod(0o600)
    options: dict[str, Any] = {
        "tls_cert": files.cert,
        "tls_key": files.key,
        "tls_client_ca": authority.file,
        "tls_client": "optional",
        "auth": str(auth),
    }
    async with serve(folder / "repo", load=loading(Mirrors()), wait=False, **options) as served:
        async with AsyncClient(served.target, tls=client_tls(authority)) as client:
            await client.wait_ready(timeout_s=20)  # health stays open to everyone
        yield served


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


async def test_credentials_decide_what_a_client_may_do(
    tmp_path: Path, authority: Authority
) -> None:
    tls = client_tls(authority)
    with_certificate = client_tls(authority, authority.issue("watcher", common_name="watcher"))
    async with guarded_server(tmp_path, authority) as served:
        async with AsyncClient(served.target, tls=tls, retry=NO_RETRY) as nobody:
            with pytest.raises(Unauthenticated, match="credential"):
                await nobody.classify(IMAGE, model="tiny")
        async with AsyncClient(served.target, tls=tls, token=TEAM_A.text, retry=NO_RETRY) as team:
            for _ in range(3):
                await team.classify(IMAGE, model="tiny")
            with pytest.raises(QuotaExceeded) as refused:
                await team.classify(IMAGE, model="tiny")
            assert refused.value.retry_after_s is not None
            assert 50 < refused.value.retry_after_s <= 100
            with pytest.raises(PermissionDenied):
                await team.list_models()
            with pytest.raises(ModelNotFound):
                await team.classify(IMAGE, model="other")
        async with AsyncClient(served.target, tls=with_certificate) as watcher:
            assert [model.name for model in await watcher.list_models()] == ["tiny"]


async def test_the_load_generator_reaches_a_guarded_server(
    tmp_path: Path, authority: Authority
) -> None:
    access = Access(tls=client_tls(authority), token=OBSERVER.text)
    async with guarded_server(tmp_path, authority) as served:
        url = f"https://127.0.0.1:{served.server.http_port}/metrics"
        plan = make_plan(served.target, access=access, metrics_url=url, classes=TINY)
        report = await measure(plan)
        assert report.summary.counts.keys() == {"OK"}
        assert report.metrics is not None
        assert report.metrics.calls > 0
        assert "convserve_requests_total" in await asyncio.to_thread(fetch, url, access)


async def test_plaintext_to_the_servers_tls_port_gets_a_hint(
    tmp_path: Path, authority: Authority
) -> None:
    async with guarded_server(tmp_path, authority) as served:
        async with AsyncClient(served.target, retry=NO_RETRY) as client:
            with pytest.raises(ServerUnreachable, match="use TLS"):
                await client.is_serving()
        with pytest.raises(ServerUnreachable, match="use TLS"):
            await measure(make_plan(served.target, classes=TINY))
