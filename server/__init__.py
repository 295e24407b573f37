"""The server: runs compiled engines behind gRPC and HTTP."""
