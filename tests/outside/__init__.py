"""Clients that are not ours call a real server: grpcio, grpc-js, h2load, nghttp, curl."""
