"""The authenticator accepts the right credentials and nothing else."""

from __future__ import annotations

import time
from collections import Counter
from ipaddress import ip_network

import pytest

from server.errors import Unauthenticated
from server.security.identity.auth_file import parse_auth_file
from server.security.identity.authenticator import FAILURES, FileAuthenticator, OpenAuthenticator
from server.security.identity.failure_limit import MAX_ADDRESSES, WINDOW_S, FailureLimit
from server.security.identity.tokens import new_token
from server.security.peer import UNIX, Peer, PeerCertificate
from server.security.principal import LOCAL_CALLER, REMOTE_CALLER
from tests.security.credentials import (
    EXPIRED,
    OPERATOR,
    RAW_VALUES,
    TEAM_A,
    TEAM_A_OLD,
    WRONG_HEADERS,
    Header,
    auth_file,
    bearer,
    token_lines,
)

WRONG = WRONG_HEADERS | {name: [("authorization", raw)] for name, raw in RAW_VALUES.items()}

PEER = Peer("203.0.113.5", False, None)
PROXY = Peer("192.0.2.7", False, None)


class Subject:
    """An authenticator of the example file, and the reasons of its refusals."""

    def __init__(self, text: str = "", per_minute: int = 0) -> None:
        self.reasons: Counter[str] = Counter()
        self.authenticator = FileAuthenticator(
            parse_auth_file((text or auth_file()).encode()), FailureLimit(per_minute)
        )

    def name_of(self, headers: list[Header], peer: Peer = PEER) -> str:
        given = [(name.encode(), value) for name, value in [("te", b"trailers"), *headers]]
        relevant = self.authenticator.relevant(given)
        return self.authenticator.identify(relevant, peer).principal.name

    def refusal(self, headers: list[Header], peer: Peer = PEER) -> Unauthenticated:
        with pytest.raises(Unauthenticated) as caught:
            self.name_of(headers, peer)
        self.authenticator.failed(caught.value, peer)
        self.reasons.update([caught.value.reason])
        return caught.value


def certificate(common_name: str = "", dns: str = "", uri: str = "") -> Peer:
    names = PeerCertificate(common_name, (dns,) if dns else (), (uri,) if uri else ())
    return Peer("203.0.113.5", False, names)


@pytest.mark.parametrize(
    "value",
    [
        bearer(TEAM_A)[1],
        bearer(TEAM_A_OLD)[1],
        b"bearer " + TEAM_A.text.encode(),
        b"BEARER   " + TEAM_A.text.encode(),
    ],
    ids=["token", "second token", "lower-case scheme", "several spaces"],
)
def test_a_token_names_its_principal(value: bytes) -> None:
    subject = Subject()
    for _ in range(2):  # the second time from what is kept of the first
        assert subject.name_of([("authorization", value)]) == "team-a"


@pytest.mark.parametrize(
    "peer",
    [
        certificate(common_name="team-a"),
        certificate(dns="a.example"),
        certificate(dns="A.EXAMPLE"),
        certificate(uri="spiffe://cluster/team-a"),
        certificate(common_name="somebody", dns="a.example"),
        certificate(common_name="team-a", uri="spiffe://cluster/team-a"),
    ],
    ids=["CN", "DNS", "DNS in capitals", "URI", "DNS and an unknown CN", "CN and URI"],
)
def test_a_client_certificate_names_its_principal(peer: Peer) -> None:
    assert Subject().name_of([], peer) == "team-a"


@pytest.mark.parametrize(
    "peer",
    [
        certificate(),
        certificate(common_name="Team-A"),
        certificate(common_name="a.example"),
        certificate(dns="team-a"),
        certificate(dns="b.a.example"),
        certificate(dns="*.example"),
        certificate(uri="spiffe://cluster/team-a/x"),
        certificate(uri="DNS:a.example"),
        certificate(common_name="DNS:a.example"),
        certificate(common_name="team-a", dns="operator.example"),
    ],
    ids=[
        *("no name", "CN in capitals", "DNS name as CN", "CN as DNS name", "subdomain", "wildcard"),
        *("longer URI", "kind in a URI", "kind in a CN", "names of two principals"),
    ],
)
def test_other_certificates_name_nobody(peer: Peer) -> None:
    subject = Subject(per_minute=1)
    for _ in range(3):  # not limited
        assert subject.refusal([], peer).reason == "unknown_certificate"


def test_a_wrong_token_does_not_fall_back_to_the_certificate() -> None:
    peer = certificate(common_name="team-a")
    assert Subject().refusal([("authorization", b"Bearer x")], peer).reason == "malformed"
    assert Subject().name_of([bearer(OPERATOR)], peer) == "operator"


def test_the_header_of_a_trusted_proxy_names_the_principal() -> None:
    subject, user = Subject(), ("x-forwarded-user", b"alice@example.org")
    assert subject.name_of([user], PROXY) == "team-a"
    assert subject.name_of([("authorization", b"Bearer a.user's.token"), user], PROXY) == "team-a"
    assert subject.name_of([bearer(OPERATOR)], PROXY) == "operator"
    assert subject.refusal([user, user], PROXY).reason == "malformed"
    other = [("x-forwarded-user", b"mallory"), bearer(OPERATOR)]
    assert subject.refusal(other, PROXY).reason == "unknown_user"
    assert subject.refusal([user], PEER).reason == "missing"
    assert subject.refusal([user], Peer(UNIX, True, None)).reason == "missing"
    assert subject.refusal([user], Peer("", False, None)).reason == "missing"
    value = bearer(OPERATOR)[1]  # a token that is known to be right, in the wrong header
    assert subject.refusal([("x-forwarded-user", value)], PEER).reason == "missing"


def test_a_proxy_on_a_unix_socket_is_trusted_only_if_the_file_says_so() -> None:
    user = ("x-forwarded-user", b"alice@example.org")
    subject = Subject(auth_file(proxy_addresses='"unix", "2001:db8::/32"'))
    assert subject.name_of([user], Peer(UNIX, True, None)) == "team-a"
    assert subject.name_of([user], Peer("2001:db8::1", False, None)) == "team-a"
    assert subject.refusal([user], PROXY).reason == "missing"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_credential_is_refused(name: str) -> None:
    subject, headers = Subject(), WRONG[name]
    error = subject.refusal(headers)
    assert error.reason in FAILURES
    for secret in (TEAM_A.text, TEAM_A.id, TEAM_A.sha256, "team-a", "operator"):
        assert secret not in str(error)
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"


def test_there_are_a_hundred_wrong_credentials() -> None:
    assert len(WRONG) >= 100


def test_unknown_ids_and_wrong_secrets_look_the_same() -> None:
    never = new_token().text.encode()
    wrong = f"cs_{TEAM_A.id}_{'0' * 64}".encode()
    first = Subject().refusal([("authorization", b"Bearer " + never)])
    second = Subject().refusal([("authorization", b"Bearer " + wrong)])
    assert (str(first), first.reason) == (str(second), second.reason)


def test_only_the_owner_of_a_token_learns_that_it_has_expired() -> None:
    subject = Subject()
    assert subject.refusal([bearer(EXPIRED)]).reason == "expired"
    guess = f"Bearer cs_{EXPIRED.id}_{'0' * 64}".encode()
    assert subject.refusal([("authorization", guess)]).reason == "unknown_token"


def test_a_known_token_ends_when_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject()
    assert subject.name_of([bearer(TEAM_A_OLD)]) == "team-a"
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 366 * 86_400)
    assert subject.refusal([bearer(TEAM_A_OLD)]).reason == "expired"
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"


def test_a_reload_revokes_tokens_that_are_gone() -> None:
    subject, other = Subject(), new_token()
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"
    text = '[principals.team-b]\nroles = ["classify"]\n' + token_lines("team-b", other)
    subject.authenticator.replace(parse_auth_file(text.encode()))
    assert subject.refusal([bearer(TEAM_A)]).reason == "unknown_token"
    assert subject.name_of([bearer(other)]) == "team-b"


def test_a_reload_moves_a_token_to_its_new_principal() -> None:
    subject = Subject()
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"
    text = '[principals.team-b]\nroles = ["observe"]\n' + token_lines("team-b", TEAM_A)
    subject.authenticator.replace(parse_auth_file(text.encode()))
    assert subject.name_of([bearer(TEAM_A)]) == "team-b"


# --- the limit of failures --------------------------------------------------------------------


def test_too_many_wrong_credentials_from_an_address_are_not_looked_at() -> None:
    subject, wrong = Subject(per_minute=3), ("authorization", b"Bearer x")
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"
    for _ in range(3):
        assert subject.refusal([wrong]).reason == "malformed"
    for _ in range(5):
        assert subject.refusal([wrong]).reason == "limited"
        assert subject.refusal([bearer(OPERATOR)]).reason == "limited"
    assert "try again in 60 s" in str(subject.refusal([wrong]))
    # A token that was right before stays right: its owner may share the address.
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"
    subject.authenticator.replace(parse_auth_file(auth_file().encode()))
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"
    # Nor does another address suffer.
    assert subject.name_of([bearer(OPERATOR)], Peer("203.0.113.6", False, None)) == "operator"
    assert subject.reasons == {"malformed": 3, "limited": 11}


def test_the_limit_ends_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, now_s = FailureLimit(2), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    limit.failed("203.0.113.5")
    now_s += WINDOW_S - 1
    limit.failed("203.0.113.5")
    assert limit.wait_s("203.0.113.5") == pytest.approx(1)
    now_s += 1
    assert limit.wait_s("203.0.113.5") == 0
    limit.failed("203.0.113.5")
    assert limit.wait_s("203.0.113.5") == 0
    limit.failed("203.0.113.5")
    assert limit.wait_s("203.0.113.5") == pytest.approx(WINDOW_S)


def test_addresses_of_one_ipv6_network_count_together() -> None:
    limit = FailureLimit(2)
    limit.failed("2001:db8::1")
    limit.failed("2001:db8::2")
    assert limit.wait_s("2001:db8::3") > 0
    assert limit.wait_s("2001:db8:0:1::1") == 0


def test_the_limit_forgets_the_address_that_failed_longest_ago() -> None:
    limit = FailureLimit(1)
    for number in range(MAX_ADDRESSES + 1):
        limit.failed(f"10.0.{number >> 8}.{number & 255}")
        limit.failed("203.0.113.5")
    assert limit.wait_s("10.0.0.0") == 0
    assert limit.wait_s("10.0.16.0") > 0
    assert limit.wait_s("203.0.113.5") > 0


def test_exempt_addresses_and_a_limit_of_zero_are_never_refused() -> None:
    exempt = FailureLimit(1, [ip_network("203.0.113.0/24")])
    unlimited = FailureLimit(0)
    for limit in (exempt, unlimited):
        for _ in range(10):
            limit.failed("203.0.113.5")
        assert limit.wait_s("203.0.113.5") == 0


def test_a_missing_credential_is_no_failure_of_the_address() -> None:
    subject = Subject(per_minute=1)
    for _ in range(5):
        assert subject.refusal([]).reason == "missing"
    assert subject.name_of([bearer(TEAM_A)]) == "team-a"


# --- without an auth file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "header", "is_local"),
    [
        (Peer("127.0.0.1", True, None), "", True),
        (Peer(UNIX, True, None), "", True),
        (Peer("203.0.113.5", False, None), "", False),
        (Peer("", False, None), "", False),
        (Peer("127.0.0.1", True, None), "x-forwarded-for", False),
        (Peer("127.0.0.1", True, None), "forwarded", False),
        (Peer("127.0.0.1", True, None), "x-real-ip", False),
        (Peer("127.0.0.1", True, None), "via", False),
        (Peer("127.0.0.1", True, None), "origin", False),
        (Peer("203.0.113.5", False, None), "x-forwarded-for", False),
    ],
)
def test_without_an_auth_file_only_direct_local_callers_may_change_something(
    peer: Peer, header: str, is_local: bool
) -> None:
    headers = [(b"te", b"trailers"), *([(header.encode(), b"127.0.0.1")] if header else [])]
    for remote_admin in (False, True):
        subject = OpenAuthenticator(allow_remote_admin=remote_admin)
        caller = subject.identify(subject.relevant(headers), peer)
        assert caller.principal is (LOCAL_CALLER if is_local or remote_admin else REMOTE_CALLER)
