"""A Classifier server that does nothing, to measure the load generator.

`python -m tests.benchmarks.targets.null_server` prints its port. It answers every Classify call
with the same bytes, and ends when its standard input does. It uses the server's own transport,
because grpcio's server would be slower than the generator.
"""

import asyncio
import socket
import sys

import uvloop

from server.api.stubs import classify_pb2 as pb
from server.transport.calls.calls_in_progress import TransportLimits
from server.transport.compression import Inflater
from server.transport.grpc_server import GrpcServer
from server.transport.methods import UnaryMethod, WireCall
from tests.support.scripted_classifier import ANSWER, SMALL

LIMITS = TransportLimits(message_bytes=64 << 20, receiving_bytes=256 << 20, streams=10_000)


async def main() -> None:
    response, model = ANSWER.SerializeToString(), SMALL.SerializeToString()

    async def classify(request: bytes, call: WireCall) -> bytes:
        return response

    async def get_model(request: bytes, call: WireCall) -> bytes:
        return model

    service = pb.DESCRIPTOR.services_by_name["Classifier"].full_name
    methods = {
        f"/{service}/Classify": UnaryMethod(classify),
        f"/{service}/GetModel": UnaryMethod(get_model),
    }
    with Inflater() as inflater:
        server = GrpcServer(methods, LIMITS, inflater)
        listener = socket.create_server(("127.0.0.1", 0))
        await server.start(listener)
        print(listener.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(None)


if __name__ == "__main__":
    uvloop.run(main())
