"""grpc-js, the gRPC of Node.js."""

from __future__ import annotations

import json

from grpc import StatusCode

from tests.outside.conftest import Digit
from tests.outside.tools import GRPC_JS, needs, needs_grpc_js, output
from tests.transport.attacks.processes import ServerProcess

pytestmark = [needs("node"), needs_grpc_js]


def test_a_javascript_client_gets_what_the_contract_says(
    server: ServerProcess, digit: Digit
) -> None:
    target = f"127.0.0.1:{server.port}"
    seen = json.loads(output("node", GRPC_JS / "client.js", target, digit.path))
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
