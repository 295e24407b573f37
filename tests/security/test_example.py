"""The auth file in docs/security.md works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from grpc import StatusCode

from server import cli
from server.api.stubs import classify_pb2 as pb
from server.security.identity.auth_file import parse_auth_file
from server.security.permissions import METHOD_ROLES
from tests.security.guarded import CLASSIFIER, classify_request, guarded
from tests.support.serving import publish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def example() -> str:
    found = re.search(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_example_serves_a_principal_with_a_new_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "example.toml"
    path.write_text(example())
    assert cli.main(["token", "new", "team-a", "--auth", str(path)]) == 0
    headers = [("authorization", b"Bearer " + capsys.readouterr().out.strip().encode())]
    (tmp_path / "repo").mkdir()
    publish(tmp_path / "repo", "resnet50")
    async with guarded(tmp_path, path.read_text()) as one:
        for model, code in (("resnet50", StatusCode.OK), ("tiny", StatusCode.NOT_FOUND)):
            answer = await one.call(f"{CLASSIFIER}Classify", classify_request(model), headers)
            assert answer[0] == code
        answer = await one.call(f"{CLASSIFIER}ListModels", pb.ListModelsRequest(), headers)
        assert answer[0] == StatusCode.PERMISSION_DENIED


def test_the_example_shows_every_kind_of_credential() -> None:
    file = parse_auth_file(example().encode())
    assert {name.partition(":")[0] for name in file.certificates} == {"CN", "DNS", "URI"}
    assert file.proxy is not None
    assert file.proxy.users
    assert len(file.tokens) == 2


def test_the_page_names_every_method() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Permissions") : text.index("## Audit")]
    for method in METHOD_ROLES:
        assert method in table or method == "ServerReflectionInfo", method
