"""Reads card files: their keys and types, cards that build on others, and label files."""
