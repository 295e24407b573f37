"""Commands that measure the server, its engines and the load generator."""
