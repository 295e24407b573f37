"""Hostile clients of the HTTP/2 transport."""
