"""Protocols: each translates its messages to an inference request and back."""
