"""Runs the batches that a scheduler chooses on a device's engines."""
