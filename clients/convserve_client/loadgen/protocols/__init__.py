"""Protocols that the load generator speaks."""
