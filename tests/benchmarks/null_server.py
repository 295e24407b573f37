"""Command: a server of the contract that does nothing, to find out what a generator can send.

    python -m tests.benchmarks.null_server

Prints its port. Every Classify gets the same bytes; it ends when its standard input does. It is the
served transport without what it serves: grpcio's server would be the limit before the generator is.
"""

import asyncio
import socket
import sys

import uvloop

from server.api.stubs import classify_pb2 as pb
from server.transport.grpc_server import (
    Call,
    Limits,
    Server,
    Unary,
)
from tests.support.scripted_classifier import ANSWER, SMALL

LIMITS = Limits(message_bytes=64 << 20, receiving_bytes=256 << 20, streams=10_000)


async def main() -> None:
    answer, model = ANSWER.SerializeToString(), SMALL.SerializeToString()

    async def classify(request: bytes, call: Call) -> bytes:
        return answer

    async def get_model(request: bytes, call: Call) -> bytes:
        return model

    service = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
    methods = {f"/{service}/Classify": Unary(classify), f"/{service}/GetModel": Unary(get_model)}
    server = Server(methods, LIMITS)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.start(listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main())
