"""TLS on accepted connections: handshakes off the event loop, encrypted transports."""
