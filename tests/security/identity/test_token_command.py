"""`convserve token` makes tokens that the server accepts, and shows each of them once."""

from __future__ import annotations

import re
import stat
import tomllib
from pathlib import Path

import pytest

from server import cli
from server.security.identity.auth_file import Identities, parse_auth_file
from server.security.identity.tokens import token_of

TOKEN = re.compile(r"cs_[0-9a-f]{16}_[0-9a-f]{64}")


def made(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    """What the command printed on standard output and standard error."""
    assert cli.main(["token", "new", *arguments]) == status
    shown = capsys.readouterr()
    return shown.out, shown.err


def owner(file: Identities, token: str) -> str:
    """The principal of a token."""
    given = token_of(b"Bearer " + token.encode())
    assert given is not None
    stored = file.tokens[given.id]
    assert stored.digest == given.digest
    return stored.principal.name


def test_the_printed_lines_are_an_auth_file_with_the_printed_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown, _ = made(capsys, "team-a", "--model", "resnet*", "--expires", "2100-01-01")
    (token,) = TOKEN.findall(shown)
    file = parse_auth_file(shown.partition("\n\n")[2].partition("\n\n")[2].encode())
    assert owner(file, token) == "team-a"
    assert file.principals["team-a"].models == ("resnet*",)
    assert shown.count(token.rpartition("_")[2]) == 1


def test_tokens_are_added_to_the_file_which_is_private_and_keeps_its_comments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "auth.toml"
    first = made(capsys, "team-a", "--auth", str(path), "--role", "admin", "--role", "observe")[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# owned by the platform team\n" + path.read_text().rstrip("\n"))
    path.chmod(0o640)
    second = made(capsys, "team-a", "--auth", str(path))[0]
    third = made(capsys, "team.b@example", "--auth", str(path))[0]
    file = parse_auth_file(path.read_bytes())
    owners = [owner(file, token.strip()) for token in (first, second, third)]
    assert owners == ["team-a", "team-a", "team.b@example"]
    assert file.principals["team-a"].roles == {"admin", "observe"}
    assert path.read_text().startswith("# owned by the platform team\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for token in (first, second, third):
        assert TOKEN.fullmatch(token.strip())
        assert token.rpartition("_")[2].strip() not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_the_file_stays_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "auth.toml"
    link.symlink_to(tmp_path / "real" / "auth.toml")
    made(capsys, "team-a", "--auth", str(link))
    assert link.is_symlink()
    assert "team-a" in tomllib.loads(link.read_text())["principals"]


def test_a_broken_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "auth.toml"
    path.write_text("[principals.a]\n")
    shown, error = made(capsys, "team-a", "--auth", str(path), status=1)
    assert not shown
    assert error == f"{path}: principals.a: Object missing required field `roles`\n"
    assert path.read_text() == "[principals.a]\n"


def test_roles_of_a_principal_in_the_file_are_changed_only_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "auth.toml"
    made(capsys, "team-a", "--auth", str(path))
    before = path.read_text()
    _, error = made(capsys, "team-a", "--auth", str(path), "--role", "admin", status=1)
    assert "principals.team-a is there already" in error
    assert path.read_text() == before


def test_a_folder_that_does_not_exist_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, error = made(capsys, "team-a", "--auth", str(tmp_path / "none" / "a.toml"), status=1)
    assert "No such file or directory" in error
    assert "none" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b"], "'a b' must be 1 to 64 letters"),
        (["anonymous"], "and not anonymous or stranger"),
        (["a", "--expires", "tomorrow"], "'tomorrow' must be a date, as 2027-01-01"),
        (["a", "--role", "root"], "root"),
        ([], "NAME"),
    ],
    ids=["space", "anonymous", "date", "role", "no name"],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["token", "new", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
