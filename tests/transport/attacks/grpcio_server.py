"""grpcio's asyncio server with health and Classify, to compare with.

`python -m tests.transport.attacks.grpcio_server` prints its port and serves until it is killed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse

from convserve_client.stubs import classify_pb2 as pb
from tests.support.scripted_classifier import ANSWER, SMALL


async def main() -> None:
    async def check(request: Any, context: Any) -> HealthCheckResponse:
        return HealthCheckResponse(status=HealthCheckResponse.SERVING)

    async def classify(request: Any, context: Any) -> pb.ClassifyResponse:
        return ANSWER

    async def get_model(request: Any, context: Any) -> pb.Model:
        return SMALL

    def method(answer: Any, request: Any) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(
            answer, request.FromString, lambda message: message.SerializeToString()
        )

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    service = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
    methods = {
        "Classify": method(classify, pb.ClassifyRequest),
        "GetModel": method(get_model, pb.GetModelRequest),
    }
    health = {"Check": method(check, health_pb2.HealthCheckRequest)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(service, methods),
            grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
