"""grpc-js, the gRPC of Node.js."""

from __future__ import annotations

import json

from grpc import StatusCode

from tests.outside.conftest import Digit, Service
from tests.outside.tools import GRPC_JS, needs, needs_grpc_js, output

pytestmark = [needs("node"), needs_grpc_js]


def test_a_javascript_client_gets_what_the_contract_says(service: Service, digit: Digit) -> None:
    environment = {"TOKEN": service.token, "TLS_CA": str(service.ca or "")}
    client = ("node", GRPC_JS / "client.js", service.target, digit.path)
    seen = json.loads(output(*client, **environment))
    assert seen == {
        "class": digit.label,
        "many": 300,
        "unknownModel": StatusCode.NOT_FOUND.value[0],
        "invalid": StatusCode.INVALID_ARGUMENT.value[0],
        "past": StatusCode.DEADLINE_EXCEEDED.value[0],
        "cancelled": StatusCode.CANCELLED.value[0],
        "largeMetadata": StatusCode.OK.value[0],
        "live": True,
        "stream": [str(number) for number in range(20)],
    }
