"""The dates of certificates, against the library cryptography."""

from __future__ import annotations

import ssl
from contextlib import suppress
from datetime import UTC, datetime

import pytest
import trustme
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from server.security.certificate_dates import validity_of

AUTHORITY = trustme.CA()


def der_until(end: datetime) -> bytes:
    issued = AUTHORITY.issue_cert("here.example", not_after=end)
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


DER = der_until(datetime(2049, 1, 2, 3, 4, 5, tzinfo=UTC))


@pytest.mark.parametrize(
    "end",
    [
        datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC),
        datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC),  # the last one with two digits of the year
        datetime(2050, 1, 1, tzinfo=UTC),
        datetime(2999, 12, 31, 23, 59, 59, tzinfo=UTC),
    ],
    ids=lambda end: f"{end:%Y}",
)
def test_the_dates_are_those_in_the_certificate(end: datetime) -> None:
    der = der_until(end)
    certificate = x509.load_der_x509_certificate(der)
    validity = validity_of(der)
    assert validity == (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    assert validity.ends == end


@settings(max_examples=300, deadline=None, derandomize=True)
@given(at=st.integers(0, len(DER) - 1), byte=st.integers(0, 255), cut=st.integers(0, 5))
def test_a_damaged_certificate_raises_nothing_but_value_errors(
    at: int, byte: int, cut: int
) -> None:
    with suppress(ValueError):
        validity_of(DER[:at] + bytes([byte]) + DER[at + 1 : len(DER) - cut])
    with suppress(ValueError):
        validity_of(DER[:at])
