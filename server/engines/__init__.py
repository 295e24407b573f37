"""Engines: compiled networks, one module or package for each backend."""
