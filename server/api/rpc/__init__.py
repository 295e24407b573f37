"""gRPC: every RPC is checked, parsed, timed and counted in the same way; health and reflection."""
