"""Client for convserve: classify images over gRPC."""
