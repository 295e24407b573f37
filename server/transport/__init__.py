"""gRPC over HTTP/2: connections, calls, the server."""
