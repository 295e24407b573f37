"""Runs the batches that a scheduler chooses on the engines of a device."""
