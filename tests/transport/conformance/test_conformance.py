"""Each case of conformance is judged on a connection of its own."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet

from tests.support.http2_peers import bare
from tests.transport.conformance.case import Case, reaction
from tests.transport.conformance.cases import frames, header_compression, kinds, messages

CASES = (*frames.CASES, *kinds.CASES, *messages.CASES, *header_compression.CASES)


def test_no_two_cases_have_the_same_title() -> None:
    assert len({case.title for case in CASES}) == len(CASES)


def parameter(case: Case) -> ParameterSet:
    marks = [pytest.mark.xfail(reason=case.deviation)] if case.deviation else []
    return pytest.param(case, id=case.title, marks=marks)


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
async def test_the_server_does_what_the_rfc_demands(case: Case) -> None:
    async with bare() as one:
        seen = await reaction(one.port, case)
        assert case.demand(seen), seen
        # Whatever one client does, the server still answers others.
        other = await reaction(one.port, PLAIN_REQUEST)
        assert PLAIN_REQUEST.demand(other)


(PLAIN_REQUEST,) = (case for case in CASES if case.title == "8.1-a-request")
