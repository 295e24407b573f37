"""The things that are measured: a bare engine, a server, and a server that does nothing."""
