"""Command: a server of the contract that does nothing, to find out what a generator can send.

    python -m tests.null_server

Prints its port. Every Classify gets the same bytes; it ends when its standard input does.
"""

import asyncio
import sys
from typing import Any

import grpc
import uvloop

from proto import classify_pb2 as pb
from tests.scripted_classifier import ANSWER, SMALL


async def main() -> None:
    answer, model = ANSWER.SerializeToString(), SMALL.SerializeToString()

    async def classify(request: bytes, context: Any) -> bytes:
        return answer

    async def get_model(request: bytes, context: Any) -> bytes:
        return model

    server = grpc.aio.server()
    service = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
    methods = {
        "Classify": grpc.unary_unary_rpc_method_handler(classify),
        "GetModel": grpc.unary_unary_rpc_method_handler(get_model),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main())
