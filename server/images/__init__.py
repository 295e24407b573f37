"""Converts image files and raw pixels to the pixels of a model."""
