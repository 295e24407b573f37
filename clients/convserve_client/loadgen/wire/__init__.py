"""Unary gRPC calls over HTTP/2, as cheap as a load generator needs them."""
