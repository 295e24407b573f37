"""An auth file with every kind of credential, and wrong credentials of every kind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from server.security.identity.tokens import NewToken, new_token

PROXY_HEADER = "x-forwarded-user"

TEAM_A, TEAM_A_OLD, EXPIRED = new_token(), new_token(), new_token()
OBSERVER, OPERATOR, REVOKED = new_token(), new_token(), new_token()

Header = tuple[str, bytes]


def auth_file(*, proxy_addresses: str = '"192.0.2.0/24"') -> str:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    next_year = (datetime.now(UTC) + timedelta(days=365)).isoformat()
    return f"""
[proxy]
header = "X-Forwarded-User"
addresses = [{proxy_addresses}]

[principals.team-a]
roles = ["classify"]
models = ["tiny*"]
certificates = ["CN:team-a", "DNS:A.example", "URI:spiffe://cluster/team-a"]
proxy_users = ["alice@example.org"]
images_per_s = 100_000
max_calls = 8
weight = 2

[principals.watcher]
roles = ["observe"]

[principals.operator]
roles = ["admin", "observe"]
certificates = ["DNS:operator.example"]

{token_lines("team-a", TEAM_A)}
{token_lines("team-a", TEAM_A_OLD, next_year)}
{token_lines("team-a", EXPIRED, yesterday)}
{token_lines("watcher", OBSERVER)}
{token_lines("operator", OPERATOR)}
"""


def token_lines(principal: str, token: NewToken, expires: str = "") -> str:
    lines = [
        "[[tokens]]",
        f'principal = "{principal}"',
        f'id = "{token.id}"',
        f'sha256 = "{token.sha256}"',
        f"expires = {expires}" if expires else "",
    ]
    return "\n".join(lines)


def bearer(token: NewToken) -> Header:
    return "authorization", b"Bearer " + token.text.encode()


def _wrong_values() -> dict[str, bytes]:
    """Wrong values of the header `authorization` that a client library can send."""
    good, other = TEAM_A.text, OPERATOR.text
    secret, other_secret = good.rpartition("_")[2], other.rpartition("_")[2]
    last = "0" if good[-1] != "0" else "1"
    values = {
        "empty": "",
        "scheme only": "Bearer",
        "scheme twice": f"Bearer Bearer {good}",
        "no scheme": good,
        "no space": f"Bearer{good}",
        "Basic": "Basic dGVhbS1hOnNlY3JldA==",
        "Basic with a token": f"Basic {good}",
        "Digest": 'Digest username="team-a", realm="convserve"',
        "Negotiate": "Negotiate YII=",
        "Token": f"Token {good}",
        "ApiKey": f"ApiKey {good}",
        "AWS": "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request",
        "JWT": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZWFtLWEifQ.",
        "JWT with an algorithm": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln",
        "quoted": f'Bearer "{good}"',
        "single quotes": f"Bearer '{good}'",
        "in angle brackets": f"Bearer <{good}>",
        "URL-encoded": f"Bearer {good.replace('_', '%5F')}",
        "comma behind": f"Bearer {good},",
        "comma before": f"Bearer ,{good}",
        "two tokens": f"Bearer {good} {good}",
        "two tokens, comma": f"Bearer {good}, Bearer {good}",
        "two schemes": f"Basic eDp5, Bearer {good}",
        "parameter": f"Bearer token={good}",
        "semicolon": f"Bearer {good};",
        "name of the principal": "Bearer team-a",
        "id only": f"Bearer {TEAM_A.id}",
        "prefix and id": f"Bearer cs_{TEAM_A.id}",
        "prefix, id, line": f"Bearer cs_{TEAM_A.id}_",
        "secret only": f"Bearer {secret}",
        "no prefix": f"Bearer {good[3:]}",
        "other prefix": f"Bearer sk_{good[3:]}",
        "upper-case prefix": f"Bearer CS_{good[3:]}",
        "upper case": f"Bearer {good.upper()}",
        "upper-case secret": f"Bearer cs_{TEAM_A.id}_{secret.upper()}x",
        "stored hash": f"Bearer {TEAM_A.sha256}",
        "stored hash as the secret": f"Bearer cs_{TEAM_A.id}_{TEAM_A.sha256}",
        "first character missing": f"Bearer {good[1:]}",
        "last character missing": f"Bearer {good[:-1]}",
        "one character more": f"Bearer {good}0",
        "last character wrong": f"Bearer {good[:-1]}{last}",
        "secret reversed": f"Bearer cs_{TEAM_A.id}_{secret[::-1]}",
        "secret of another": f"Bearer cs_{TEAM_A.id}_{other_secret}",
        "id of another": f"Bearer cs_{OPERATOR.id}_{secret}",
        "zeros": f"Bearer cs_{'0' * 16}_{'0' * 64}",
        "known id, zeros": f"Bearer cs_{TEAM_A.id}_{'0' * 64}",
        "effs": f"Bearer cs_{'f' * 16}_{'f' * 64}",
        "never issued": f"Bearer {new_token().text}",
        "revoked": f"Bearer {REVOKED.text}",
        "expired": f"Bearer {EXPIRED.text}",
        "expired, wrong secret": f"Bearer cs_{EXPIRED.id}_{secret}",
        "glob": f"Bearer cs_{TEAM_A.id}_*",
        "pattern": "Bearer cs_.*_.*",
        "null": "Bearer null",
        "undefined": "Bearer undefined",
        "template": "Bearer ${CONVSERVE_TOKEN}",
        "SQL": "Bearer ' OR '1'='1",
        "path": "Bearer ../../etc/passwd",
        "format": "Bearer {0.__class__}%s%n",
        "8 KB": f"Bearer {'0' * 7000}",
        "a token in 6 KB": f"Bearer {good}{'0' * 6000}",
        "6 KB of spaces": f"Bearer {' ' * 6000}x",
        "1,000 schemes": "Bearer " * 850 + good,
    }
    values |= {
        f"truncated to {length}": f"Bearer {good[:length]}" for length in range(4, len(good), 6)
    }
    return {name: value.encode("ascii") for name, value in values.items()}


# The last character of an upper-case secret is not hexadecimal: a secret of digits only would be
# equal to its lower-case form.
WRONG_VALUES = _wrong_values()

# gRPC's own clients refuse to send these.
RAW_VALUES = {
    "tab for space": b"Bearer\t" + TEAM_A.text.encode(),
    "UTF-8": "Bearer \u00e9\u4e2d\U0001f40d".encode(),
    "full-width digits": f"Bearer cs_{TEAM_A.id}_".encode() + "\uff10".encode() * 64,
    "Latin-1": b"Bearer \xe9\xe8",
    "invalid UTF-8": b"Bearer \xff\xfe",
    "no-break space": b"Bearer\xa0" + TEAM_A.text.encode(),
    "soft hyphen": TEAM_A.text.encode().join((b"Bearer ", b"\xc2\xad")),
    "overlong": b"Bearer \xc0\x80" + TEAM_A.text.encode(),
}

# Whole lists of headers.
WRONG_HEADERS: dict[str, list[Header]] = {
    "none": [],
    "two headers, both right": [bearer(TEAM_A), bearer(TEAM_A)],
    "two headers, right one first": [bearer(TEAM_A), ("authorization", b"Bearer x")],
    "two headers, right one last": [("authorization", b"Basic eDp5"), bearer(TEAM_A)],
    "two tokens of two principals": [bearer(TEAM_A), bearer(OPERATOR)],
    "proxy-authorization": [("proxy-authorization", bearer(TEAM_A)[1])],
    "x-authorization": [("x-authorization", bearer(TEAM_A)[1])],
    "x-api-key": [("x-api-key", TEAM_A.text.encode())],
    "cookie": [("cookie", b"authorization=" + TEAM_A.text.encode())],
    "www-authenticate": [("www-authenticate", bearer(TEAM_A)[1])],
    "header of a proxy that is not trusted": [(PROXY_HEADER, b"alice@example.org")],
    "header of a proxy, name of a principal": [(PROXY_HEADER, b"team-a")],
    "x-forwarded-for": [("x-forwarded-for", b"127.0.0.1")],
    "x-forwarded-for the proxy": [
        ("x-forwarded-for", b"192.0.2.1"),
        (PROXY_HEADER, b"alice@example.org"),
    ],
    "forwarded": [("forwarded", b"for=192.0.2.1"), (PROXY_HEADER, b"alice@example.org")],
    "x-forwarded-client-cert": [("x-forwarded-client-cert", b'Subject="CN=team-a"')],
    "x-ssl-client-cn": [("x-ssl-client-s-dn", b"CN=team-a"), ("x-ssl-client-verify", b"SUCCESS")],
} | {name: [("authorization", value)] for name, value in WRONG_VALUES.items()}
