"""TLS and bearer tokens: how a client proves who it is, and knows whom it talks to."""
