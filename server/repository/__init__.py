"""Reads and writes the model repository: the folders that a build publishes and a server serves."""
