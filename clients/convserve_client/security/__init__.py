"""TLS and bearer tokens: how a client proves its identity, and checks that of the server."""
