"""Engines in, answers out. Never imports torch."""
