"""The auth file: what it may hold, and what is said about a wrong one."""

from __future__ import annotations

import math
import random
from contextlib import suppress

import pytest

from server.security.identity.auth_file import Identities, InvalidAuthFile, parse_auth_file
from server.security.principal import Role
from tests.security.credentials import TEAM_A, auth_file, token_lines

PRINCIPAL = '[principals.a]\nroles = ["classify"]\n'
PROXY = '[proxy]\nheader = "%s"\naddresses = [%s]\n'

WRONG = [
    ("", "has no table under principals"),
    ("# nothing\n[principals]\n", "has no table under principals"),
    ("[principals.a", "is not TOML: Expected ']' at the end of a table declaration (at end of"),
    ("x = 1\ny = = 2", "is not TOML: Invalid value (at line 2, column 5)"),
    (
        "[principals.a]\nroles = []",
        "principals.a: Expected `array` of length >= 1",
    ),
    ("[principals.a]", "principals.a: Object missing required field `roles`"),
    (PRINCIPAL + "color = 1", "principals.a: Object contains unknown field `color`"),
    (PRINCIPAL + "[extra]", "Object contains unknown field `extra`"),
    (
        '[principals.a]\nroles = ["root"]',
        "principals.a: Invalid enum value 'root' - at `",
    ),
    (PRINCIPAL + 'models = "all"', "principals.a: Expected `array`, got `str` - at `models`"),
    (PRINCIPAL + "weight = 0", "principals.a: Expected `float` > 0.0 - at `weight`"),
    (PRINCIPAL + "weight = inf", "principals.a: Expected `float` <= 1000000.0 - at `weight`"),
    (PRINCIPAL + "images_per_s = nan", "principals.a: Expected `float` > 0.0"),
    (PRINCIPAL + "max_calls = 0", "principals.a: Expected `int` >= 1 - at `max_calls`"),
    ('[principals."a b"]\nroles = ["admin"]', "principals: 'a b' is not a name; 1 to 64"),
    ('[principals.anonymous]\nroles = ["admin"]', "principals: 'anonymous' is not a name"),
    (PRINCIPAL + token_lines("b", TEAM_A), "tokens[0]: principal names no table under principals"),
    (PRINCIPAL + "[[tokens]]", "tokens[0]: Object missing required field `principal`"),
    (
        PRINCIPAL + 2 * f"{token_lines('a', TEAM_A)}\n",
        "tokens[1]: an earlier token has",
    ),
    (
        PRINCIPAL + token_lines("a", TEAM_A, "2027-01-01T00:00:00"),
        "tokens[0]: Expected `datetime` with a timezone component - at `expires`",
    ),
    (
        PRINCIPAL + token_lines("a", TEAM_A).replace("sha256", "secret"),
        "tokens[0]: Object contains unknown field `secret`",
    ),
    (
        PRINCIPAL + 'certificates = ["a.example"]',
        "principals.a: certificates[0] must be CN:",
    ),
    (
        f'{PRINCIPAL}certificates = ["CN:x"]\n[principals.b]\nroles = ["admin"]\n'
        'certificates = ["CN:y", "CN:x"]',
        "principals.b: certificates[1] also belongs to principals.a",
    ),
    (PRINCIPAL + 'proxy_users = ["u"]', "principals.a: proxy_users[0] needs the table proxy"),
    (
        PROXY % ("x-user", ""),
        "Expected `array` of length >= 1 - at `proxy.",
    ),
    (
        PRINCIPAL + PROXY % ("x-user", '"a.example"'),
        "proxy: addresses[0] must be an IP",
    ),
    (
        PRINCIPAL + PROXY % ("Authorization", '"unix"'),
        "proxy: header must be the name",
    ),
    (PRINCIPAL + PROXY % ("x user", '"unix"'), "proxy: header must be the name"),
    ("x = " + "[" * 10_000, "is not TOML: "),
    ("\ud800", "is not TOML: "),
    ("x" * (17 << 20), "has 17,825,792 bytes; at most 16,777,216 are allowed"),
]


def parsed(text: str) -> Identities:
    return parse_auth_file(text.encode())


def test_a_complete_file_gives_principals_with_permissions_and_quotas() -> None:
    file = parsed(auth_file())
    assert sorted(file.principals) == ["operator", "team-a", "watcher"]
    team = file.principals["team-a"]
    assert team.roles == {Role.CLASSIFY}
    assert team.models == ("tiny*",)
    assert (team.images_per_s, team.burst, team.max_calls, team.weight) == (1e5, 1e5, 8, 2)
    operator = file.principals["operator"]
    assert operator.roles == {Role.ADMIN, Role.OBSERVE}
    assert (operator.images_per_s, operator.burst) == (math.inf, math.inf)
    assert (operator.max_calls, operator.weight) == (None, 1)


def test_the_burst_of_a_slow_principal_allows_one_image() -> None:
    assert parsed(PRINCIPAL + "images_per_s = 0.5").principals["a"].burst == 1
    assert parsed(PRINCIPAL + "images_per_s = 5\nburst = 20").principals["a"].burst == 20


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_file_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(InvalidAuthFile) as caught:
        parse_auth_file(text.encode("utf-8", "surrogatepass"))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("field", ["id", "sha256", "expires", "principal"])
def test_no_message_quotes_a_token_in_a_wrong_place(field: str) -> None:
    secret = TEAM_A.text.rpartition("_")[2][:8]
    lines = [line for line in token_lines("a", TEAM_A).splitlines() if not line.startswith(field)]
    for value in (f'"{TEAM_A.text}"', TEAM_A.text, f"'''{TEAM_A.text}", f'["{TEAM_A.text}"]'):
        text = PRINCIPAL + "\n".join([*lines, f"{field} = {value}"])
        with pytest.raises(InvalidAuthFile) as caught:
            parsed(text)
        assert secret not in str(caught.value)


def test_a_damaged_file_never_causes_another_error() -> None:
    """A change of a byte may leave a valid file; whatever is wrong is an InvalidAuthFile."""
    random.seed(16)
    whole = auth_file().encode()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data))] = random.randrange(256)
        start = random.randrange(len(data))
        with suppress(InvalidAuthFile):
            parse_auth_file(bytes(data[:start] + data[start + random.randrange(9) :]))
