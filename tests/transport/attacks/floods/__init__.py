"""The attacks, by what they flood the server with."""
